"""Reading tensors in PyTorch's layout by name, with errors that name the tensor."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from quantizable_flax.errors import UserError, nearest

Tree = dict[str, Any]  # names to numpy arrays or to further trees


class TensorReader:
    """Takes named tensors out of a mapping, and knows at the end which were left over.

    Attributes:
      prefix: prepended to every name that is asked for.
    """

    def __init__(self, mapping: Mapping[str, np.ndarray], prefix: str = ""):
        self._mapping, self.prefix, self._used = mapping, prefix, set[str]()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the tensor as float32.

        Raises:
          UserError: no tensor of that name, or another shape.
        """
        name = self.prefix + name
        if name not in self._mapping:
            raise UserError(
                f"the weights have no tensor {name!r}{nearest(name, self._mapping)}: they belong "
                "to another architecture or attention variant than the configuration."
            )
        value = np.asarray(self._mapping[name], dtype=np.float32)
        if value.shape != shape:
            raise UserError(
                f"tensor {name!r} should have shape {shape} by the configuration, found "
                f"{value.shape}."
            )
        self._used.add(name)
        return value

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> Tree:
        """A torch Linear ([out, in], y = x W^T + b) as our kernel [in, out] and bias."""
        layer = {"kernel": self.take(f"{name}.weight", (outputs, inputs)).T}
        return layer | ({"bias": self.take(f"{name}.bias", (outputs,))} if bias else {})

    def patches(self, name: str, size: int, channels: int, outputs: int) -> Tree:
        """A torch Conv2d with stride = kernel size as a Dense on flattened patches."""
        kernel = self.take(f"{name}.weight", (outputs, channels, size, size))
        return {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, outputs),
            "bias": self.take(f"{name}.bias", (outputs,)),
        }

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.prefix + name in self._mapping

    def layer_norm(self, name: str, width: int) -> Tree:
        """A torch LayerNorm as scale and bias; Google's first files say gamma and beta."""
        old = f"{self.prefix}{name}.gamma" in self._mapping
        scale, bias = ("gamma", "beta") if old else ("weight", "bias")
        return {
            "scale": self.take(f"{name}.{scale}", (width,)),
            "bias": self.take(f"{name}.{bias}", (width,)),
        }

    def embedding(self, name: str, rows: int, width: int) -> Tree:
        """A torch Embedding [rows, width]."""
        return {"embedding": self.take(f"{name}.weight", (rows, width))}

    def check_all_used(self, ignorable: Iterable[str]) -> None:
        """Raises UserError if a tensor was neither taken nor ends in one of `ignorable`."""
        ignorable = tuple(ignorable)
        left = [
            name
            for name in self._mapping
            if name not in self._used and not name.endswith(ignorable)
        ]
        if left:
            raise UserError(
                f"{len(left)} tensors have no place in the configured model, the first is "
                f"{left[0]!r}: check model.num_layers and model.attention.gate."
            )
