"""The mesh, and where state and batches lie on it."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from quantizable_flax.data.share import Share
from quantizable_flax.errors import UserError
from quantizable_flax.nn.partition import AXES, BATCH_AXES, RULES


def make_mesh(sizes: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of the configured sizes; one of -1 takes the remaining devices.

    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    shape = [sizes[axis] for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh sizes must be positive, one of them may be -1, found {asked}.")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"the mesh must use all {len(devices)} devices, found {asked}: set one size to -1 or "
            f"make the product {len(devices)}."
        )
    return Mesh(_arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list[jax.Device], shape: list[int]) -> np.ndarray:
    """Neighbours of a mesh axis are neighbours in the torus; slices are along the data axis."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and shape[0] % slices == 0:
        across = [slices, *(1 for _ in shape[1:])]
        within = [shape[0] // slices, *shape[1:]]
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """Returns how many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, grad_accum_steps: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of examples of a micro-batch."""
    shards = batch_shards(mesh)
    if grad_accum_steps < 1 or batch_size < 1 or batch_size % (shards * grad_accum_steps):
        raise UserError(
            "train.batch_size must be a multiple of mesh.data * mesh.fsdp * "
            f"train.grad_accum_steps = {shards} * {grad_accum_steps}, found {batch_size}: change "
            "one of them."
        )


def check_sizes(config: ConfigDict, model: nn.Module, mesh: Mesh) -> None:
    """Raises UserError unless batch, heads, vocabulary and sequences divide among the devices."""
    check_batch(config.train.batch_size, config.train.grad_accum_steps, mesh)
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    if model.config.num_heads % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {model.config.num_heads} heads: choose a "
            "divisor of model.num_heads."
        )
    words = getattr(model.config, "vocab_size", 0)
    if words % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide model.vocab_size={words}: raise it to "
            f"{words + -words % tensor}, the tokenizer may have fewer tokens."
        )
    length = model.config.length(config.data)
    if length % sequence:
        raise UserError(
            f"mesh.sequence={sequence} does not divide sequences of {length} tokens: choose "
            "another mesh.sequence or another length."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@functools.lru_cache
def batch_share(mesh: Mesh, process_index: int | None = None) -> Share:
    """Returns which parts of a batch the devices of a process hold, by default of this one."""
    mine = jax.process_index() if process_index is None else process_index
    count = batch_shards(mesh)
    sizes = [mesh.shape[axis] if axis in BATCH_AXES else 1 for axis in mesh.axis_names]
    numbers = np.broadcast_to(np.arange(count).reshape(sizes), mesh.devices.shape)
    held = zip(numbers.flat, mesh.devices.flat, strict=True)
    return Share(tuple(sorted({int(n) for n, dev in held if dev.process_index == mine})), count)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's rows of a global batch, those of `batch_share`, to its devices."""
    sharding, share = batch_sharding(mesh), batch_share(mesh)

    def put(rows):
        size = len(rows) // len(share.parts)
        shape = (size * share.count, *rows.shape[1:])
        places = sharding.addressable_devices_indices_map(shape)
        pieces = []
        for index in places.values():
            first, *rest = index or ()
            at = share.parts.index((first.start or 0) // size) * size
            pieces.append(rows[(slice(at, at + size), *rest)])
        arrays = jax.device_put(pieces, list(places))
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    return {key: put(value) for key, value in batch.items()}


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays of this process, the same on all, whole to every device of the mesh."""
    devices = [
        device for device in mesh.devices.flat if device.process_index == jax.process_index()
    ]

    def put(x):
        copies = jax.device_put([x] * len(devices), devices)
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), copies)

    return jax.tree.map(put, tree)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a tree of (abstract) parameters with logical axes.

    Args:
      boxed: shapes as `jax.eval_shape` gives them, parameters boxed with their logical axes.
      mesh: as made by `make_mesh`.

    Raises:
      UserError: a mesh axis does not divide the parameter axis that it splits.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)

    def check(path, leaf, sharding):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide an axis of "
                    f"{jax.tree_util.keystr(path)} with shape {leaf.shape}: choose another "
                    f"mesh.{axis} or another model size."
                )

    jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), shardings)
    return shardings
