"""Range estimators: from tensors to the [min, max] of a grid (arXiv 2306.12929, section 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.quantization.grid import make_grid, rounded

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
    """Smallest and largest value of x, of the whole tensor or of each channel (axes kept).

    Both are NaN where a value is not finite.
    """
    axes = _reduced_axes(x, channel_axis)
    keep = channel_axis is not None
    x = x.astype(jnp.float32)
    # Looked at by itself: XLA's smallest and largest value on a CPU may pass over a NaN.
    known = jnp.isfinite(x).all(axes, keepdims=keep)
    return _known(known, x.min(axes, keepdims=keep), x.max(axes, keepdims=keep))


def min_max_of_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of each row: [..., D] -> two of [..., 1]."""
    x = x.astype(jnp.float32)
    return x.min(-1, keepdims=True), x.max(-1, keepdims=True)


def percentile_range(
    x: jax.Array, percentile: float, channel_axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The (100 - p)-th and p-th percentile, linear interpolation, p > 50.

    Of the whole tensor or of each channel (axes kept); NaN where a value is not finite, even one
    that the percentile would leave out.
    """
    axes, x = _reduced_axes(x, channel_axis), x.astype(jnp.float32)
    shape = () if channel_axis is None else x.min(axes, keepdims=True).shape
    channels = x[None] if channel_axis is None else jnp.moveaxis(x, channel_axis, 0)
    ordered = jnp.sort(channels.reshape(len(channels), -1))
    # Sorting puts -inf first, inf last and NaN behind it.
    known = jnp.isfinite(ordered[:, 0]) & jnp.isfinite(ordered[:, -1])
    size = ordered.shape[1]

    def at(p: float) -> jax.Array:
        # The position is a Python float: in float32 it would be off by whole places in a tensor
        # of a billion values.
        place = p / 100.0 * (size - 1)
        below = min(int(place), size - 2) if size > 1 else 0
        step = ordered[:, min(below + 1, size - 1)] - ordered[:, below]
        return (ordered[:, below] + (place - below) * step).reshape(shape)

    return _known(known.reshape(shape), at(100.0 - percentile), at(percentile))


def update_running(
    old: Range, x: jax.Array, *, momentum: float, percentile: float | None = None
) -> Range:
    """One step of running min-max: the first batch as it is, then `m * old + (1 - m) * new`.

    A batch with a value that is not finite makes the range NaN, and it stays so.
    """
    low, high = min_max(x) if percentile is None else percentile_range(x, percentile)
    first = old.batches == 0
    # Both weights are rounded from Python floats: 1 - float32(0.9) is not float32(0.1), and that
    # drift would move every later rounding.
    old_weight, new_weight = np.float32(momentum), np.float32(1.0 - momentum)
    keep, take = jnp.where(first, 0.0, old_weight), jnp.where(first, 1.0, new_weight)
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
    no value is negative; the smallest of equal candidates wins. NaN where a value is not finite.
    """
    low, high = min_max(x)  # of the whole tensor for channels too, as published
    lows, highs = thresholds(low, high, symmetric=True)

    def error(ends):
        low, high = ends
        return squared_error(x, low, high, bits, symmetric=True, channel_axis=channel_axis)

    # A loop, not vmap: a hundred copies of an embedding table would not fit in memory.
    return best_candidate(lows, highs, jax.lax.map(error, (lows, highs)))


def thresholds(
    low: jax.Array,
    high: jax.Array,
    *,
    symmetric: bool,
    count: int = MSE_CANDIDATES,
    margin: float = MSE_MARGIN,
) -> tuple[jax.Array, jax.Array]:
    """The published candidates for data in [low, high], smallest first: two arrays [count].

    [0, t] where no value is negative, else [-t, t], or [-t, 0] on an asymmetric grid if no value
    is positive.
    """
    reach = jnp.maximum(-low, high) + margin
    ends = jnp.arange(1, count + 1, dtype=jnp.float32) * (reach / count)
    no_high = jnp.logical_not(symmetric) & (low < 0.0) & (high <= 0.0)
    return jnp.where(low >= 0.0, 0.0, -ends), jnp.where(no_high, 0.0, ends)


def squared_error(
    x: jax.Array,
    low: jax.Array,
    high: jax.Array,
    bits: int,
    *,
    symmetric: bool,
    channel_axis: int | None = None,
) -> jax.Array:
    """Summed squared error of x on the grid of [low, high], of all or of each channel (axes kept).

    That of `fake_quantize`, but in steps, so that each number of the grid enters once: then XLA
    makes one pass of it on a CPU too (3 ms for 6 million values on two cores), without the copies
    of x that it makes there where a scale is used twice.
    """
    grid = make_grid(low, high, bits, symmetric=symmetric)
    steps = x.astype(jnp.float32) / grid.scale
    codes = jnp.clip(jnp.round(steps), grid.lower - grid.zero_point, grid.upper - grid.zero_point)
    keep = channel_axis is not None
    total = jnp.sum((codes - steps) ** 2, _reduced_axes(x, channel_axis), keepdims=keep)
    return total * grid.scale**2


def best_candidate(
    lows: jax.Array, highs: jax.Array, losses: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first of the candidates [n] with the least of the losses [n, ...]; NaN if none is finite.

    A value that is not finite makes every loss so: it is infinitely far from any grid.
    """
    best = jnp.argmin(losses, axis=0)
    return _known(jnp.isfinite(jnp.min(losses, axis=0)), lows[best], highs[best])


def _known(known: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both ends where they are known, else NaN."""
    return jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan)


def _reduced_axes(x: jax.Array, channel_axis: int | None) -> tuple[int, ...]:
    kept = None if channel_axis is None else channel_axis % x.ndim
    return tuple(axis for axis in range(x.ndim) if axis != kept)
