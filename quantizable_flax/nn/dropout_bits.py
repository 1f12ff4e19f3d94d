"""What dropout draws from: JAX's own generator, or that of the accelerator.

Threefry is arithmetic, some hundred operations a number, and draws the same on any mesh. The
accelerator's generator (RngBitGenerator) is far cheaper. XLA partitions it by drawing for the whole
batch on every device, so here each device draws for its own examples.
"""

import functools
import math
from typing import Any

import jax
from jax.extend.random import define_prng_impl, rbg_prng_impl
from jax.sharding import Mesh, PartitionSpec

from quantizable_flax.errors import check_choice
from quantizable_flax.nn.partition import BATCH_AXES

DROPOUT_BITS = ("auto", "threefry", "rbg")


def dropout_key(bits: str, seed: int, mesh: Mesh) -> jax.Array:
    """Returns the key of a seed.

    Args:
      bits: as `config.train.dropout_bits`; "auto" by the devices of the mesh.
      seed: any integer.
      mesh: where the numbers are drawn.

    Raises:
      UserError: other bits.
    """
    check_choice("train.dropout_bits", bits, DROPOUT_BITS)
    if bits == "auto":
        bits = "threefry" if mesh.devices.flat[0].platform == "cpu" else "rbg"
    return jax.random.key(seed, impl="threefry2x32" if bits == "threefry" else _by_device(mesh))


@functools.cache
def _by_device(mesh: Mesh) -> Any:
    """The generator `rbg` whose first axis, that of examples, lies as a batch does."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        if parts == 1 or not shape or shape[0] % parts:
            return rbg_prng_impl.random_bits(key, width, shape)

        def own(key: jax.Array) -> jax.Array:
            own_key = rbg_prng_impl.fold_in(key, jax.lax.axis_index(BATCH_AXES).astype("uint32"))
            return rbg_prng_impl.random_bits(own_key, width, (shape[0] // parts, *shape[1:]))

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(BATCH_AXES),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )(key)

    return define_prng_impl(
        key_shape=rbg_prng_impl.key_shape,
        seed=rbg_prng_impl.seed,
        split=rbg_prng_impl.split,
        random_bits=random_bits,
        fold_in=rbg_prng_impl.fold_in,
        name="rbg_by_device",
        tag="rbgd",
    )
