"""The one table from logical axis names to mesh axes, and activations that follow it.

Parameters carry logical names (`nn.layers.partitioned_param`), activations get theirs from
`constrain`, by Flax's logical constraints; XLA's SPMD partitioner derives every collective.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
from jax.sharding import Mesh, PartitionSpec

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


def is_partitioned() -> bool:
    """Whether XLA splits the program of the trace over several devices."""
    mesh = _mesh.get()
    return mesh is not None and mesh.size > 1


def platform() -> str:
    """Where the program of the trace will run: "cpu", "gpu" or "tpu"."""
    mesh = _mesh.get()
    if mesh is not None:
        kind = mesh.devices.flat[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", str(device))


def split_axes(sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Logical name -> the mesh axes that its size is split over; {} outside a mesh of several.

    Args:
      sizes: logical name -> size; a name whose mesh axes do not divide it stays whole.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return {}
    return {
        name: _axes(name) if size % _parts(name, mesh) == 0 else () for name, size in sizes.items()
    }


def on_parts(
    function: Callable[..., jax.Array], in_specs: Any, out_specs: PartitionSpec
) -> Callable[..., jax.Array]:
    """`function` on each device's part of its arguments, for programs that XLA cannot partition."""
    # Gradients of what all devices hold alike are summed over them either way.
    return jax.shard_map(
        function, mesh=_mesh.get(), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


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
    return math.prod(mesh.shape[axis] for axis in _axes(name))


def _axes(name: str | None) -> tuple[str, ...]:
    axes = dict(RULES).get(name or "", ())
    return (axes,) if isinstance(axes, str) else tuple(axes)
