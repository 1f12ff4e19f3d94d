"""Matrices of a tile of heads, [rows, lanes], in a TPU kernel."""

from typing import Any

import jax
import jax.numpy as jnp

# By name: libraries that intercept `jax.lax.dot_general` by patching it are not to reach in here.
from jax.lax import dot_general

from quantizable_flax.kernels.tpu_plan import Plan
from quantizable_flax.quantization.tensor import precision_of

NT, NN = (1, 1), (1, 0)  # which axes of two matrices a product sums over


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The float32 product of two matrices, summed over an axis of each."""
    return dot_general(
        *(x, y, (((axes[0],), (axes[1],)), ((), ()))),
        precision=precision_of(x, y),
        preferred_element_type=jnp.float32,
    )


def transposed(x: jax.Array) -> jax.Array:
    """Of a matrix, by way of float32, which every TPU can transpose."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def there(x: jax.Array, count: Any) -> jax.Array:
    """[rows, lanes], zero from row `count` on.

    Beyond the end of an array is anything, infinities too.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < count, x.astype(jnp.float32), 0.0).astype(x.dtype)


def of_head(plan: Plan, x: jax.Array, head: int, scale: float = 1.0) -> jax.Array:
    """[rows, lanes] times `scale`, zero outside the tile's `head`.

    A product with it is that head's alone, and takes as long as one with fewer lanes would.
    """
    if plan.tile_heads == 1 and scale == 1.0:
        return x
    scaled = x.astype(jnp.float32) * scale
    if plan.tile_heads > 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        start = head * plan.head_width
        scaled = jnp.where((lane >= start) & (lane < start + plan.head_width), scaled, 0.0)
    return scaled.astype(x.dtype)


def rows_of_head(plan: Plan, x: jax.Array, head: int) -> jax.Array:
    """Rows of [lanes, n] that are those of the tile's `head`."""
    return x[head * plan.head_width : (head + 1) * plan.head_width]


def clear(*sums: Any) -> None:
    """Sets memory on the chip to zero."""
    for ref in sums:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
