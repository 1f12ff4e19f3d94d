"""What passes one site: how its values are spread, and who carries the large ones."""

import collections

import jax.numpy as jnp
import numpy as np

from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.report.measured import BULK, SIGMAS, Carrier, GridOver, Histogram, Values

BINS = 120
WIDENED = 0.5  # of the width of the bulk, on both sides


def describe(
    site: str, x_BxTxD: np.ndarray, visible_BxT: np.ndarray, tokens_BxT: list[list[str]]
) -> Values:
    """Returns what passes a site; padding does not count.

    Args:
      site: its name.
      x_BxTxD: what passes.
      visible_BxT: False for padding.
      tokens_BxT: what the tokens are called.
    """
    x_NxD = x_BxTxD[visible_BxT].astype(np.float64)
    low, high, mean, std = x_NxD.min(), x_NxD.max(), x_NxD.mean(), x_NxD.std()
    bulk = tuple(float(p) for p in np.percentile(x_NxD, BULK))
    margin = WIDENED * (bulk[1] - bulk[0])
    far_NxD = np.abs(x_NxD - mean) > SIGMAS * std
    names_N = [
        name
        for names, visible in zip(tokens_BxT, visible_BxT, strict=True)
        for name, seen in zip(names, visible, strict=True)
        if seen
    ]
    largest_BxT = np.abs(x_BxTxD).max(axis=2) * visible_BxT
    example = int(np.argmax(largest_BxT.max(axis=1)))
    return Values(
        site=site,
        examples=len(x_BxTxD),
        tokens=len(x_NxD),
        low=float(low),
        high=float(high),
        mean=float(mean),
        std=float(std),
        bulk=(bulk[0], bulk[1]),
        whole=_histogram(x_NxD, low, high),
        near=_histogram(x_NxD, max(low, bulk[0] - margin), min(high, bulk[1] + margin)),
        outliers=int(far_NxD.sum()),
        outliers_D=far_NxD.sum(axis=0),
        largest_D=np.abs(x_NxD).max(axis=0),
        carriers=_carriers(names_N, far_NxD.any(axis=1), np.abs(x_NxD).max(axis=1)),
        example=example,
        strip_T=largest_BxT[example],
    )


def _histogram(x: np.ndarray, low: float, high: float) -> Histogram:
    if not high > low:
        high = low + 1.0
    return Histogram(*np.histogram(x, BINS, (low, high)))


def _carriers(names_N: list[str], far_N: np.ndarray, largest_N: np.ndarray) -> list[Carrier]:
    known = collections.Counter(names_N)
    carrying: collections.Counter[str] = collections.Counter()
    largest: dict[str, float] = {}
    for name, far, size in zip(names_N, far_N, largest_N, strict=True):
        if far:
            carrying[name] += 1
            largest[name] = max(largest.get(name, 0.0), float(size))
    found = [Carrier(name, known[name], n, largest[name]) for name, n in carrying.items()]
    return sorted(found, key=lambda c: (-c.carrying, -c.largest, c.token))


def grid_over(
    values: Values, setting: str, low: float, high: float, bits: int, *, symmetric: bool
) -> GridOver:
    """Returns the grid of a calibrated range, over the values of its site."""
    grid = make_grid(jnp.float32(low), jnp.float32(high), bits, symmetric=symmetric)
    step, zero = float(grid.scale), float(grid.zero_point)
    lower, upper = float(grid.lower), float(grid.upper)
    levels = step * (np.arange(lower, upper + 1.0) - zero)
    inside = (levels >= values.bulk[0]) & (levels <= values.bulk[1])
    return GridOver(setting, levels[0], levels[-1], step, len(levels), int(inside.sum()))
