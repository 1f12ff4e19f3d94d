"""Taking tensors out of a mapping by name, with errors that name the tensor."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from quantizable_flax.errors import UserError, nearest
from quantizable_flax.interop.names import Place, find, without_wrappers


class TensorReader:
    """Takes named tensors out of a mapping, and knows at the end which were left over.

    Names are those of the whole model: wrappers' prefixes are found and left away.

    Attributes:
      root: what precedes the names of the model's body, of the roots the one that was found.
      found: whether the tensor by which the model is found is there.
    """

    def __init__(
        self, mapping: Mapping[str, np.ndarray], anchor: str, roots: tuple[str, ...] = ("",)
    ):
        """Finds the model in the mapping; anchor and roots as for `names.find`."""
        self._mapping, self._names = mapping, without_wrappers(mapping)
        self._used = set[str]()
        place = find(self._names, anchor, roots)
        self.found = place is not None
        self._outer, self.root = place or Place("", roots[0])

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the tensor as float32.

        Raises:
          UserError: no tensor of that name, another shape, or no floating-point numbers.
        """
        if not self.has(name):
            raise UserError(
                f"the weights have no tensor {self._outer + name!r}"
                f"{nearest(self._outer + name, self._names)}: they belong to another architecture "
                "or attention variant than the configuration."
            )
        value = self._read(name)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"tensor {self.given(name)!r} should hold floating-point numbers, found "
                f"{value.dtype}: save the weights before they are quantized."
            )
        if value.shape != shape:
            raise UserError(
                f"tensor {self.given(name)!r} should have shape {shape} by the configuration, "
                f"found {value.shape}."
            )
        return value.astype(np.float32)

    def tied(self, name: str, alias: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a tensor that stands under two names, or under one of them.

        Raises:
          UserError: as `take`, or the two differ: the original model did not tie them.
        """
        if not self.has(alias):
            return self.take(name, shape)
        other = self.take(alias, shape)
        if not self.has(name):
            return other
        value = self.take(name, shape)
        if not np.array_equal(value, other, equal_nan=True):
            raise UserError(
                f"tensors {self.given(name)!r} and {self.given(alias)!r} should be equal, as the "
                f"head is tied, but differ in {np.count_nonzero(value != other)} of {value.size} "
                "numbers: load weights that were trained with tie_word_embeddings=True."
            )
        return value

    def ignore(self, *names: str) -> None:
        """Lets tensors pass that the model has no use for; the names are whole."""
        self._used.update(self._outer + name for name in names)

    def ignore_positions(self, name: str) -> None:
        """Lets a buffer of position ids pass.

        Raises:
          UserError: it does not count 0, 1, 2, ..., as our models do.
        """
        if not self.has(name):
            return
        ids = self._read(name).ravel()
        if not np.array_equal(ids, np.arange(len(ids))):
            raise UserError(
                f"tensor {self.given(name)!r} should count positions from 0, found "
                f"{ids[:4].tolist()}...: reorder the position table by it and remove it."
            )

    def given(self, name: str) -> str:
        """The name as it stands in the mapping."""
        return self._names[self._outer + name]

    def _read(self, name: str) -> np.ndarray:
        self._used.add(self._outer + name)
        return np.asarray(self._mapping[self.given(name)])

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self._outer + name in self._names

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name, or any below it."""
        start = f"{self._outer}{name}."
        return self.has(name) or any(known.startswith(start) for known in self._names)

    def first(self, names: tuple[str, ...]) -> str:
        """The first of several names that the mapping has, the first of all if none."""
        return next(filter(self.has, names), names[0])

    def check_all_used(self) -> None:
        """Raises UserError if a tensor was neither taken nor ignored."""
        left = [given for name, given in self._names.items() if name not in self._used]
        if left:
            raise UserError(
                f"{len(left)} tensors have no place in the configured model, the first is "
                f"{left[0]!r}: check model.num_layers and model.attention.gate, or leave out what "
                "the model does not use."
            )
