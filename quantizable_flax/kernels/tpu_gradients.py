"""Gradients of a tile of heads from one sheet of scores a head, in a TPU kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantizable_flax.kernels.scheme import Scheme
from quantizable_flax.kernels.tpu_sheet import (
    Sheet,
    both,
    clipped,
    query_scale,
    slope,
    survivors,
    through_clip,
    where,
)
from quantizable_flax.kernels.tpu_tile import NN, NT, dot, of_head, rows_of_head, transposed


class Gradients(NamedTuple):
    """What a sheet adds to gradients, without factors that `scaled` multiplies sums with."""

    queries: jax.Array | None  # [lanes, queries]
    keys: jax.Array | None  # [keys, lanes]
    values: jax.Array | None  # [keys, lanes]
    weighted: list[jax.Array]  # D by head, [1, queries] each


def tile_gradients(
    sheet: Sheet,
    tile: int,
    refs: tuple[Any, Any, Any, Any, Any, Any],
    *,
    of_queries: bool = True,
    of_keys: bool = True,
) -> Gradients:
    """Gradients of a tile.

    Args:
      sheet: where the sheet lies.
      tile: its number in the grid step.
      refs: blocks of q, k, v, the log-sum-exp, D and the gradient of the result; D is None where
        the sheet has whole rows, and is summed.
      of_queries, of_keys: whose gradients are wanted.
    """
    plan, keys = sheet.plan, sheet.size[0]
    lanes = slice(tile * plan.lanes, (tile + 1) * plan.lanes)
    q, k, v, logsumexp, given, d_out = refs
    rows, d_rows = (sheet.queries_there(x[0, :, lanes]) for x in (q, d_out))
    cols, vals = (sheet.keys_there(x[0, :keys, lanes]) for x in (k, v))
    cols_T = transposed(cols) if of_queries else None
    seen = sheet.seen()
    d_queries, d_keys, d_values, sums = [], [], [], []
    for place in range(tile * plan.tile_heads, (tile + 1) * plan.tile_heads):
        head = place % plan.tile_heads
        own, d_own = sheet.own_rows(place, rows), of_head(plan, d_rows, head)
        total = sheet.row_there(logsumexp[0, place], jnp.inf)
        probs = jnp.exp(sheet.scores_of(own, cols, seen) - total)
        weights, d_probs = _through_weights(sheet, place, probs, dot(vals, d_own, NT))
        if given is None:
            weighted = jnp.sum(probs * d_probs, axis=0, keepdims=True)
        else:
            weighted = sheet.row_there(given[0, place], 0.0)
        d_scores = (probs * (d_probs - weighted)).astype(k.dtype)
        sums.append(weighted)
        if cols_T is not None:
            d_queries.append(dot(rows_of_head(plan, cols_T, head), d_scores, NN))
        if of_keys:
            d_keys.append(dot(d_scores, own, NN))
            d_values.append(dot(weights.astype(d_own.dtype), d_own, NN))
    # Products with the rows of a head are zero in the lanes of the others.
    return Gradients(
        jnp.concatenate(d_queries) if of_queries else None,
        _total(d_keys),
        _total(d_values),
        sums,
    )


def scaled(
    scheme: Scheme, dtype: Any, queries: jax.Array | None, keys: Any, values: Any
) -> tuple[Any, Any, Any]:
    """Sums of `Gradients` with the factors left out, queries as [queries, lanes]; dtype is q's."""
    if queries is not None:
        queries = queries.T * (scheme.scale * slope(scheme))
    if keys is not None:
        keys = keys * (slope(scheme) * scheme.scale / query_scale(scheme, dtype))
        values = values * survivors(scheme)
    return queries, keys, values


def _through_weights(
    sheet: Sheet, head: int, probs: jax.Array, d_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights after clip and dropout, and the gradient of the probabilities."""
    keep = sheet.keep(head)
    weights, passes = probs, keep
    if sheet.scheme.clips:
        stretched = sheet.scheme.stretched(probs)
        weights = clipped(sheet.scheme, stretched)
        passes = both(through_clip(sheet.scheme, stretched), keep)
    return where(keep, weights), where(passes, d_weights)


def _total(parts: list[jax.Array]) -> jax.Array | None:
    return sum(parts[1:], start=parts[0]) if parts else None
