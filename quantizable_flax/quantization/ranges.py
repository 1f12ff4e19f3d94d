"""Range estimators: from tensors to the [min, max] of a grid (arXiv 2306.12929, section 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantizable_flax.quantization.grid import rounded, symmetric_grid
from quantizable_flax.quantization.tensor import fake_quantize

MSE_CANDIDATES = 100
MSE_MARGIN = 0.5


class Range(NamedTuple):
    """A range being estimated; `batches` of them have been seen, 0 means unknown.

    min and max are float32 in the tensor's unit: scalars, or of shape [..., C, ...] with ones on
    the reduced axes for a per-channel weight.
    """

    min: jax.Array
    max: jax.Array
    batches: jax.Array


def min_max(x: jax.Array, channel_axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of x, of the whole tensor or of each channel (axes kept)."""
    axes = _reduced_axes(x, channel_axis)
    keep = channel_axis is not None
    x = x.astype(jnp.float32)
    return x.min(axes, keepdims=keep), x.max(axes, keepdims=keep)


def min_max_of_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of each row: [..., D] -> two of [..., 1]."""
    x = x.astype(jnp.float32)
    return x.min(-1, keepdims=True), x.max(-1, keepdims=True)


def percentile_range(x: jax.Array, percentile: float) -> tuple[jax.Array, jax.Array]:
    """The (100 - p)-th and p-th percentile of the whole tensor, linear interpolation, p > 50."""
    ordered = jnp.sort(x.astype(jnp.float32).ravel())

    def at(p: float) -> jax.Array:
        # The position is a Python float: in float32 it would be off by whole places in a tensor
        # of a billion values.
        place = p / 100.0 * (x.size - 1)
        below = min(int(place), x.size - 2) if x.size > 1 else 0
        step = ordered[min(below + 1, x.size - 1)] - ordered[below]
        return ordered[below] + (place - below) * step

    return at(100.0 - percentile), at(percentile)


def update_running(
    old: Range, x: jax.Array, *, momentum: float, percentile: float | None = None
) -> Range:
    """One step of running min-max: the first batch as it is, then `m * old + (1 - m) * new`."""
    low, high = min_max(x) if percentile is None else percentile_range(x, percentile)
    first = old.batches == 0
    # Both weights are rounded from Python floats: 1 - float32(0.9) is not float32(0.1), and that
    # drift would move every later rounding.
    keep, take = jnp.where(first, 0.0, momentum), jnp.where(first, 1.0, 1.0 - momentum)
    return Range(
        rounded(keep * old.min) + rounded(take * low),
        rounded(keep * old.max) + rounded(take * high),
        old.batches + 1,
    )


def mse_range(
    x: jax.Array, bits: int, channel_axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The symmetric threshold with the least squared quantization error of x.

    The published grid search: thresholds k/100 of (max|x| + 0.5) for k = 1..100, one-sided where
    no value is negative; the smallest of equal candidates wins.
    """
    x = x.astype(jnp.float32)
    axes, keep = _reduced_axes(x, channel_axis), channel_axis is not None
    top = jnp.max(jnp.abs(x))  # of the whole tensor for channels too, as published
    one_sided = jnp.all(x >= 0.0)

    def bounds(k):
        threshold = k * ((top + MSE_MARGIN) / MSE_CANDIDATES)
        return jnp.where(one_sided, 0.0, -threshold), threshold

    def error(k):
        low, high = bounds(k)
        grid = symmetric_grid(low, high, bits)
        return jnp.sum((fake_quantize(x, grid) - x) ** 2, axes, keepdims=keep)

    # A loop, not vmap: a hundred copies of an embedding table would not fit in memory.
    errors = jax.lax.map(error, jnp.arange(1, MSE_CANDIDATES + 1, dtype=jnp.float32))
    return bounds(1.0 + jnp.argmin(errors, axis=0).astype(jnp.float32))


def _reduced_axes(x: jax.Array, channel_axis: int | None) -> tuple[int, ...]:
    kept = None if channel_axis is None else channel_axis % x.ndim
    return tuple(axis for axis in range(x.ndim) if axis != kept)
