"""Range estimation by name: one state per site, one update per calibration batch.

The names of activation estimators:
  minmax: running min-max, or running percentiles (arXiv 2306.12929, section 5).
  mse: of a fixed set of candidates the one with the least squared error summed over all batches.
  mse_last: the original code's way for activations: a local minimum of the squared error of the
    last batch alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantizable_flax.quantization.brent import bounded_minimum
from quantizable_flax.quantization.ranges import (
    MSE_CANDIDATES,
    MSE_MARGIN,
    Range,
    best_candidate,
    min_max,
    mse_range,
    percentile_range,
    squared_error,
    thresholds,
    update_running,
)

# How the ends of the candidates of `mse` relate to the best ends found so far, and to the smallest
# and largest value before that. The last row stays for all batches: near the best of the first
# batch it is fine, and it reaches out for batches with larger values.
_STAGES = (
    tuple(2.0**power for power in range(-8, 2)),
    tuple(
        2.0 ** (0.2 * power) for power in (-4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5)
    ),
    (0.6, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.6, 2.5),
)


class MseRange(NamedTuple):
    """A `Range` that `mse` estimates, its candidates and their losses.

    min and max are scalars; lows, highs and losses are float32 [candidates], fixed by the first
    batch but for the losses, which are sums over the batches.
    """

    min: jax.Array
    max: jax.Array
    batches: jax.Array
    lows: jax.Array
    highs: jax.Array
    losses: jax.Array


class LastRange(NamedTuple):
    """A `Range` that `mse_last` estimates; reach and one_sided are of the first batch."""

    min: jax.Array
    max: jax.Array
    batches: jax.Array
    reach: jax.Array
    one_sided: jax.Array


State = Range | MseRange | LastRange


def empty(
    estimator: str, shape: tuple[int, ...] = (), *, candidates: int = MSE_CANDIDATES
) -> State:
    """Returns the state before any batch: all zeros.

    shape is that of min and max: () for activations, ones and channels for a weight.
    """
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    known = Range(zeros(shape), zeros(shape), jnp.int32(0))
    if estimator == "mse":
        return MseRange(*known, *(zeros(candidates) for _ in range(3)))
    if estimator == "mse_last":
        return LastRange(*known, zeros(()), jnp.array(False))
    return known


@functools.partial(
    jax.jit,
    static_argnames=("estimator", "bits", "symmetric", "momentum", "percentile"),
    inline=True,
)
def update(
    state: State,
    x: jax.Array,
    *,
    estimator: str,
    bits: int,
    symmetric: bool,
    momentum: float = 0.9,
    percentile: float | None = None,
) -> State:
    """Returns the state after one more batch x of an activation, [B, ...].

    A value that is not finite makes min and max NaN, for good. momentum and percentile are of
    `minmax`, bits and symmetric (the grid to come) of the others.
    """
    if estimator == "mse":
        return update_mse(MseRange(*state), x, bits=bits, symmetric=symmetric)
    if estimator == "mse_last":
        return update_mse_last(LastRange(*state), x, bits=bits, symmetric=symmetric)
    return update_running(Range(*state), x, momentum=momentum, percentile=percentile)


@functools.partial(
    jax.jit, static_argnames=("estimator", "bits", "percentile", "channel_axis"), inline=True
)
def weight_range(
    w: jax.Array,
    *,
    estimator: str,
    bits: int,
    percentile: float | None = None,
    channel_axis: int | None = None,
) -> Range:
    """Returns the range of a weight, of the whole tensor or of each channel (axes kept)."""
    if estimator == "mse":
        low, high = mse_range(w, bits, channel_axis)
    elif percentile is not None:
        low, high = percentile_range(w, percentile, channel_axis)
    else:
        low, high = min_max(w, channel_axis)
    return Range(low, high, jnp.int32(1))


def update_mse(
    old: MseRange, x: jax.Array, *, bits: int, symmetric: bool, margin: float = MSE_MARGIN
) -> MseRange:
    """Adds the squared errors of x to all candidates; the first of the least sums is the range.

    The first batch fixes the candidates. Symmetric grids and data of one sign: the published
    thresholds, k/100 of (max|x| + margin). Other data on asymmetric grids: 10 low times 10 high
    ends, put round the best of two coarser sets. The original searches 12,800 pairs there (8
    bits) or a local minimum in the last batch: see `update_mse_last`.

    Costs 100 passes over x, at the first batch of two-sided data 300.
    """
    first = old.batches == 0
    low, high = min_max(x)
    two_sided = (low < 0.0) & (high > 0.0) & (not symmetric)
    lows, highs = thresholds(low, high, symmetric=symmetric, count=len(old.losses), margin=margin)
    if not symmetric:
        pairs = _pairs(low, high, jnp.int32(0))
        lows, highs = jnp.where(two_sided, pairs[0], lows), jnp.where(two_sided, pairs[1], highs)

    def error(ends):
        low, high = ends
        return squared_error(x, low, high, bits, symmetric=symmetric)

    def search(stage, found):
        lows, highs, _ = found
        # A loop over the candidates: a hundred copies of x would not fit in memory.
        losses = jax.lax.map(error, (lows, highs))
        if not symmetric:
            finer = _pairs(*best_candidate(lows, highs, losses), stage + 1)
            more = stage + 1 < stages
            lows, highs = jnp.where(more, finer[0], lows), jnp.where(more, finer[1], highs)
        return lows, highs, losses

    stages = jnp.where(first & two_sided, len(_STAGES), 1)
    lows, highs = jnp.where(first, lows, old.lows), jnp.where(first, highs, old.highs)
    lows, highs, losses = jax.lax.fori_loop(0, stages, search, (lows, highs, old.losses))
    losses += old.losses
    return MseRange(*best_candidate(lows, highs, losses), old.batches + 1, lows, highs, losses)


def _pairs(low: jax.Array, high: jax.Array, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All pairs of a multiple of low and a multiple of high."""
    shares = jnp.array(_STAGES, jnp.float32)[stage]
    lows, highs = jnp.meshgrid(low * shares, high * shares, indexing="ij")
    return lows.ravel(), highs.ravel()


def update_mse_last(old: LastRange, x: jax.Array, *, bits: int, symmetric: bool) -> LastRange:
    """The range with the least squared error of x: a local minimum, earlier batches forgotten.

    As the original: thresholds in (0.01, 1) of max|x| + 0.5 of the first batch; on an asymmetric
    grid, unless the first batch has no negative value, half ranges instead, each with the best of
    its shifts by up to a quarter of the grid.

    Costs 10 to 30 passes over x, with shifts 10 to 30 times as many.
    """
    first = old.batches == 0
    low, high = min_max(x)
    reach = jnp.where(first, jnp.maximum(-low, high) + MSE_MARGIN, old.reach)
    one_sided = jnp.where(first, low >= 0.0, old.one_sided)
    # The number of integers to shift by, times a step, as a share of half a range.
    most = 2.0 * (2**bits // 4) / (2.0**bits - 1.0)

    def error(low, high):
        return squared_error(x, low, high, bits, symmetric=symmetric)

    def by_threshold():
        end, loss = bounded_minimum(
            lambda end: error(jnp.where(one_sided, 0.0, -end), end), 0.01 * reach, reach
        )
        return jnp.where(one_sided, 0.0, -end), end, loss

    def best_shift(half):
        return bounded_minimum(
            lambda shift: error(shift - half, shift + half), -most * half, most * half
        )

    def by_shift():
        half, _ = bounded_minimum(lambda half: best_shift(half).value, 0.01 * reach, reach)
        shift, loss = best_shift(half)
        return shift - half, shift + half, loss

    ends = by_threshold() if symmetric else jax.lax.cond(one_sided, by_threshold, by_shift)
    known = jnp.isfinite(ends[2]) & ~jnp.isnan(old.min)
    low, high = (jnp.where(known, end, jnp.nan) for end in ends[:2])
    return LastRange(low, high, old.batches + 1, reach, one_sided)
