"""How the parameters of a module are stored there: tensors in PyTorch's layout, piece by piece."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.models.weights import Batched, Gate, Names, Part, Patches, Stored

Shape = tuple[int, ...]
# Of a parameter of Linear, Embedding and LayerNorm: how its name ends there, older ones behind.
ENDS: dict[str, tuple[str, ...]] = {
    "kernel": (".weight",),
    "embedding": (".weight",),
    "scale": (".weight", ".gamma"),
    "bias": (".bias",),
}
OLD_BIAS = (".bias", ".beta")  # of a LayerNorm in Google's first files


class Piece(NamedTuple):
    """A tensor of theirs, or some rows of it, that is a parameter of ours, or that of one head.

    Attributes:
      path: of our parameter.
      names: of the tensor; the others are alternatives to the first.
      shape: of the tensor.
      split: our axes, taken apart.
      axes: their order there.
      head: the place on our first axis, which `split` leaves out, None for the whole parameter.
      rows: of the tensor.
    """

    path: str
    names: tuple[str, ...]
    shape: Shape
    split: Shape
    axes: Shape
    head: int | None = None
    rows: slice = slice(None)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our parameter, or our head's, as it stands in those rows."""
        block = ours if self.head is None else ours[self.head]
        return block.reshape(self.split).transpose(self.axes).reshape(-1, *self.shape[1:])

    def ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """The inverse, from the whole tensor; `shape` is the whole parameter's."""
        moved = [self.split[axis] for axis in self.axes]
        block = theirs[self.rows].reshape(moved).transpose(np.argsort(self.axes))
        return block.reshape(shape if self.head is None else shape[1:])


def pieces(
    table: Mapping[str, Names | Stored], root: str, shapes: Mapping[str, Shape], config: Any
) -> Iterator[Piece]:
    """Yields what the parameters are made of, as far as the table names them, in its order.

    Args:
      table: as in `WeightNames.names`.
      root: what `{root}` stands for.
      shapes: of our parameters, by path.
      config: the family's, of the model that has them.
    """
    modules: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = shape
        modules.setdefault(path, {})[""] = shape
    for path, stored in table.items():
        names = stored.names if isinstance(stored, Stored) else stored
        for i in range(config.num_layers if "{i}" in path else 1):
            ours = path.format(i=i)
            full = [
                name.format(i=i, root=root)
                for name in ((names,) if isinstance(names, str) else names)
            ]
            yield from _module(stored, ours, full, modules.get(ours, {}), config)


def _module(
    stored: Names | Stored, path: str, names: list[str], params: dict[str, Shape], config: Any
) -> Iterator[Piece]:
    """The pieces of one module, or of one parameter by itself, whose name in `params` is ""."""
    if isinstance(stored, Gate) and params:
        yield from _gate(config.gate.kind, path, names, params)
        return
    if "" in params:
        piece = _same(path, tuple(names), params[""])
        batched = isinstance(stored, Batched)
        yield piece._replace(shape=(1, *piece.shape)) if batched else piece
    for name, ends in ENDS.items():
        if name not in params:
            continue
        if name == "bias" and "scale" in params:
            ends = OLD_BIAS
        full = tuple(start + end for start in names for end in ends)
        yield _whole(stored, f"{path}/{name}", full, params[name], config)


def _whole(
    stored: Names | Stored, path: str, names: tuple[str, ...], shape: Shape, config: Any
) -> Piece:
    """A parameter of a Linear, an Embedding, a LayerNorm or of what is marked in the table."""
    if not path.endswith("/kernel"):
        piece = _same(path, names, shape)
    elif isinstance(stored, Patches):
        size, channels, width = config.patch_size, config.channels, shape[1]
        there, split = (width, channels, size, size), (size, size, channels, width)
        piece = Piece(path, names, there, split, (3, 2, 0, 1))
    else:
        piece = _turned(path, names, shape)
    if isinstance(stored, Part):
        rows, *others = piece.shape
        block = slice(stored.index * rows, (stored.index + 1) * rows)
        piece = piece._replace(shape=(stored.of * rows, *others), rows=block)
    return piece


def _gate(kind: str, path: str, names: list[str], params: dict[str, Shape]) -> Iterator[Piece]:
    """The original's `alpha`: a vector, one Linear, or for each head a Linear or two of them."""
    if kind in ("value", "elementwise"):
        return  # of other papers: no checkpoint has a name for it, and the caller says so
    if kind == "unconditional":
        yield _same(f"{path}/logit", tuple(names), params["logit"])
        return
    if kind == "all_heads_linear":
        yield from _module("", path, names, params, None)
        return
    heads, inputs = params["kernel"]
    last = ".2" if kind == "mlp" else ""
    for head in range(heads):
        starts = [f"{name}.{head}" for name in names]

        def full(end: str, starts: list[str] = starts) -> tuple[str, ...]:
            return tuple(start + end for start in starts)

        if kind == "mlp":
            shape = params["hidden_kernel"][1:]
            kernel = _turned(f"{path}/hidden_kernel", full(".0.weight"), shape)
            bias = _same(f"{path}/hidden_bias", full(".0.bias"), shape[1:])
            yield from (kernel._replace(head=head), bias._replace(head=head))
        yield Piece(f"{path}/kernel", full(f"{last}.weight"), (1, inputs), (inputs,), (0,), head)
        yield Piece(f"{path}/bias", full(f"{last}.bias"), (1,), (1,), (0,), head)


def _same(path: str, names: tuple[str, ...], shape: Shape) -> Piece:
    return Piece(path, names, shape, shape, tuple(range(len(shape))))


def _turned(path: str, names: tuple[str, ...], shape: Shape) -> Piece:
    """A matrix [in, out], which is [out, in] there."""
    return Piece(path, names, shape[::-1], shape, (1, 0))
