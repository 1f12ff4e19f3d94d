"""The uniform affine grid: scale, zero point, bounds (arXiv 2306.12929, section 2).

What a model does at hundreds of sites is `jax.jit(..., inline=True)`, here and in the files that
read this one: it is traced once for each shape and leaves no call in the program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Grid(NamedTuple):
    """A grid of integers `q` in [lower, upper] that stand for `scale * (q - zero_point)`.

    Attributes:
      scale: float32, a scalar or broadcastable to the tensor; in the tensor's unit per step.
      zero_point: float32 holding an integer, same shape as scale.
      lower: smallest integer (array or Python number).
      upper: largest integer.
    """

    scale: jax.Array
    zero_point: jax.Array
    lower: jax.Array | float
    upper: jax.Array | float


MIN_MAX = 1e-8  # a range always reaches this far above 0, so that no scale is 0


def asymmetric_grid(x_min: jax.Array, x_max: jax.Array, bits: int) -> Grid:
    """Unsigned grid [0, 2^bits - 1] over [x_min, x_max], widened to contain 0."""
    upper = 2.0**bits - 1
    scale, zero_point = _scale_and_zero(x_min, x_max, upper)
    return Grid(scale, zero_point, 0.0, upper)


@functools.partial(jax.jit, static_argnames="upper", inline=True)
def _scale_and_zero(
    x_min: jax.Array, x_max: jax.Array, upper: float
) -> tuple[jax.Array, jax.Array]:
    x_min = jnp.minimum(x_min.astype(jnp.float32), 0.0)
    x_max = jnp.maximum(x_max.astype(jnp.float32), MIN_MAX)
    # Of a division by a constant XLA makes a product with its reciprocal, and of a / (b / c) a
    # product by c: each a last digit off, which decides ties.
    barrier = jax.lax.optimization_barrier
    step = barrier((x_max - x_min) / barrier(jnp.float32(upper)))
    # As published, the zero point comes from the step before its floor is applied.
    zero_point = jnp.clip(jnp.round(-x_min / step), 0.0, upper)
    return jnp.maximum(step, MIN_MAX), zero_point


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def symmetric_grid(x_min: jax.Array, x_max: jax.Array, bits: int) -> Grid:
    """Grid with zero point 0: signed if any minimum is negative, else unsigned.

    Signed: scale = max|x| / (2^(bits-1) - 1) on [-2^(bits-1), 2^(bits-1) - 1]; unsigned:
    scale = max / (2^bits - 1) on [0, 2^bits - 1]. One sign serves all channels.
    """
    x_min = jnp.minimum(x_min.astype(jnp.float32), 0.0)
    x_max = jnp.maximum(x_max.astype(jnp.float32), MIN_MAX)
    signed = jnp.any(x_min < 0.0)
    lower, upper = symmetric_bounds(signed, bits)
    scale = jnp.maximum(jnp.maximum(-x_min, x_max) / upper, MIN_MAX)
    return Grid(scale, jnp.zeros_like(scale), lower, upper)


def symmetric_bounds(signed: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest integer of a grid with zero point 0, float32 scalars."""
    half, zero = np.float32(2.0 ** (bits - 1)), np.float32(0.0)
    return jnp.where(signed, -half, zero), jnp.where(signed, half, 2.0 * half) - 1.0


def make_grid(x_min: jax.Array, x_max: jax.Array, bits: int, *, symmetric: bool) -> Grid:
    """Returns the symmetric or the asymmetric grid of a range; bits in 2..16."""
    return (symmetric_grid if symmetric else asymmetric_grid)(x_min, x_max, bits)


def centred(codes: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """`codes - zero_point` in float32: integers, exactly; no zero point is one of 0."""
    codes = codes.astype(jnp.float32)
    return codes if zero_point is None else codes - zero_point.astype(jnp.float32)


def rounded(product: jax.Array) -> jax.Array:
    """Returns product, rounded to float32 before anything is added to it.

    XLA may contract a product and a following sum into one fused multiply-add, which skips a
    rounding; on a quantization grid that last bit decides ties. Bounding the product by the
    largest finite number changes no finite value and keeps the two operations apart.
    """
    return jnp.minimum(product, jnp.finfo(jnp.float32).max)
