"""The one table from logical axis names to mesh axes, and activations that follow it.

Parameters carry logical names (`nn.layers.partitioned_param`), activations get theirs from
`constrain`, by Flax's logical constraints; XLA's SPMD partitioner derives every collective.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar, cast

import flax.linen as nn
import jax
from jax.sharding import Mesh

from quantizable_flax.quantization.tensor import Quantized, Tensor

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both
RULES = (
    ("batch", BATCH_AXES),
    ("length", "sequence"),  # of activations; keys and values are gathered for attention
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),  # of parameters; activations keep their width whole
)
T = TypeVar("T", bound=Tensor)
_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Activations that are traced inside are laid out on the mesh; None leaves them alone."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def splits_length() -> bool:
    """Whether the mesh of the trace splits sequences."""
    mesh = _mesh.get()
    return mesh is not None and mesh.shape["sequence"] > 1


def constrain(x: T, *names: str | None) -> T:
    """x with its axes laid out as the table says; x itself outside `on_mesh`.

    A name whose mesh axes do not divide the axis of x leaves it whole.

    Args:
      x: an array, or a tensor on a grid, whose codes are meant.
      names: a logical name or None for each axis of x.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    if isinstance(x, Quantized):
        return cast(T, x.moved(lambda codes: _constrain(codes, names, mesh), lambda grid: grid))
    return cast(T, _constrain(cast(jax.Array, x), names, mesh))


def _constrain(x: jax.Array, names: tuple[str | None, ...], mesh: Mesh) -> jax.Array:
    divided = [
        name if size % _parts(name, mesh) == 0 else None
        for name, size in zip(names, x.shape, strict=True)
    ]
    return nn.with_logical_constraint(x, tuple(divided), RULES, mesh)


def _parts(name: str | None, mesh: Mesh) -> int:
    axes = dict(RULES).get(name or "", ())
    parts = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
        parts *= mesh.shape[axis]
    return parts
