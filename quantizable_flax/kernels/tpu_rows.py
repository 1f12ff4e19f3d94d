"""TPU kernels for whole rows of scores: one sweep forwards, and one kernel backwards.

D is summed where the gradients of a row's probabilities are, so that forwards nothing is computed
for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quantizable_flax.kernels import tpu_plan
from quantizable_flax.kernels import tpu_sheet as sheets
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.kernels.tpu_plan import Plan
from quantizable_flax.kernels.tpu_sheet import LOWEST, NN, NT, Sheet, dot


def forward(
    scheme: Scheme,
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    training: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Packed q, k, v -> the context [B, T, lanes], and the log-sum-exp [B, heads, 1, T]."""
    specs = _specs(plan)
    logsumexp = jax.ShapeDtypeStruct((plan.batch, plan.all_heads, 1, plan.queries), jnp.float32)
    out, saved = tpu_plan.call(
        functools.partial(_forward_kernel, scheme, plan),
        plan,
        (tpu_plan.scalars(extras), q, k, v, *tpu_plan.ids_and_sink(plan, extras)),
        [specs.queries(), specs.keys(), specs.keys(), *specs.ids_and_sink(extras)],
        [
            (jax.ShapeDtypeStruct(q.shape, v.dtype), specs.queries()),
            (logsumexp, specs.rows()) if training else (None, None),
        ],
        name="attention_rows_forward",
        grid=plan.grid,
        products=2,
    )
    return out, saved


def _specs(plan: Plan) -> tpu_plan.Specs:
    return tpu_plan.Specs(plan, query=lambda i, j, ref: i, key=lambda i, j, ref: 0)


def _forward_kernel(
    scheme, plan, scalars, q, k, v, query_ids, key_ids, sink, out, logsumexp
):
    def block(sheet: Sheet):
        seen, keys = sheet.seen(), sheet.size[0]
        for tile, lanes in _tiles(plan):
            rows, cols = q[0, :, lanes], k[0, :keys, lanes]
            vals = sheets.there(v[0, :keys, lanes], plan.keys, plan.keys >= keys)
            vals = sheets.transposed(vals)
            contexts = []
            for head in range(plan.tile_heads):
                place = tile * plan.tile_heads + head
                scale = sheets.scales(scheme, cols)[0]
                scores = sheet.scores(sheets.of_head(plan, rows, head, scale), cols, seen)
                extra = None if sink is None else sink[sheet.head + place]
                weights, factor, total = _softmax(scheme, scores, extra, blind=seen is not None)
                weights = sheets.where(sheet.keep(place), weights).astype(v.dtype)
                contexts.append(dot(sheets.rows_of_head(plan, vals, head), weights, NN) * factor)
                if logsumexp is not None:
                    logsumexp[0, place] = total
            out[0, :, lanes] = jnp.concatenate(contexts).T.astype(out.dtype)

    _by_prefix(scheme, plan, scalars, query_ids, key_ids, block)


def _softmax(
    scheme: Scheme, scores: jax.Array, sink: jax.Array | None, *, blind: bool
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Weights before dropout, what multiplies their product with values, and the log-sum-exp."""
    highest = jnp.max(scores, axis=0, keepdims=True)
    if sink is not None:
        highest = jnp.maximum(highest, sink)
    exps = jnp.exp(scores - highest)
    total = jnp.sum(exps, axis=0, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - highest)
    logsumexp, inverse = highest + jnp.log(total), 1.0 / total
    if blind:  # queries may see nothing
        logsumexp = jnp.where(highest == LOWEST, jnp.inf, logsumexp)
        inverse = jnp.where(highest == LOWEST, 0.0, inverse)
    if not scheme.clips:
        return exps, inverse * sheets.survivors(scheme), logsumexp
    stretched = exps * (inverse * (scheme.zeta - scheme.gamma)) + scheme.gamma
    return sheets.clipped(scheme, stretched), sheets.survivors(scheme), logsumexp


def backward(
    scheme: Scheme,
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    logsumexp: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Packed gradients of q, k and v, and with a sink D, [B, heads, 1, T]."""
    specs = _specs(plan)
    query_ids, key_ids, _ = tpu_plan.ids_and_sink(plan, extras)
    one = plan.grid[2] == 1
    shape = (plan.block_k, plan.tiles * plan.lanes)
    d_q, d_k, d_v, weighted = tpu_plan.call(
        functools.partial(_backward_kernel, scheme, plan),
        plan,
        (tpu_plan.scalars(extras), q, k, v, query_ids, key_ids, logsumexp, d_out),
        [
            *(specs.queries(), specs.keys(), specs.keys()),
            *specs.ids_and_sink(extras)[:2],
            *(specs.rows(), specs.queries()),
        ],
        [
            (jax.ShapeDtypeStruct(q.shape, q.dtype), specs.queries()),
            (jax.ShapeDtypeStruct(k.shape, k.dtype), specs.keys()),
            (jax.ShapeDtypeStruct(v.shape, v.dtype), specs.keys()),
            (None, None)
            if extras.sink is None
            else (jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32), specs.rows()),
        ],
        name="attention_rows_backward",
        grid=plan.grid,
        products=5,
        scratch=() if one else (pltpu.VMEM(shape, jnp.float32), pltpu.VMEM(shape, jnp.float32)),
        carries=2,
    )
    return d_q, d_k, d_v, weighted


def _backward_kernel(
    scheme, plan, scalars, q, k, v, query_ids, key_ids, logsumexp, d_out, d_q, d_k, d_v, weighted,
    *sums,
):
    index, last = pl.program_id(2), plan.grid[2] - 1
    if sums:

        @pl.when(index == 0)
        def _():
            for total in sums:
                total[...] = jnp.zeros(total.shape, jnp.float32)

    def block(sheet: Sheet):
        seen, keys = sheet.seen(), sheet.size[0]
        whole = plan.queries % plan.block_q == 0
        left = plan.queries - sheet.query
        for tile, lanes in _tiles(plan):
            rows, d_rows = (sheets.there(x[0, :, lanes], left, whole) for x in (q, d_out))
            cols, vals = (
                sheets.there(x[0, :keys, lanes], plan.keys, plan.keys >= keys) for x in (k, v)
            )
            d_rows_T, d_cols, d_vals = [], 0.0, 0.0
            cols_T = sheets.transposed(cols)
            for head in range(plan.tile_heads):
                place = tile * plan.tile_heads + head
                total = logsumexp[0, place]
                if not whole:
                    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
                    total = jnp.where(lane < left, total, jnp.inf)
                own = sheets.of_head(plan, rows, head, sheets.scales(scheme, cols)[0])
                d_own = sheets.of_head(plan, d_rows, head)
                probs = jnp.exp(sheet.scores(own, cols, seen) - total)
                weights, d_scores, sums_of_row = sheet.gradients(
                    place, probs, dot(vals, d_own, NT), None
                )
                d_scores = d_scores.astype(k.dtype)
                d_vals += dot(weights.astype(d_own.dtype), d_own, NN)
                d_cols += dot(d_scores, own, NN)
                d_rows_T.append(dot(sheets.rows_of_head(plan, cols_T, head), d_scores, NN))
                if weighted is not None:
                    weighted[0, place] = sums_of_row * sheets.slope(scheme)
            d_q[0, :, lanes] = (
                jnp.concatenate(d_rows_T).T * (scheme.scale * sheets.slope(scheme))
            ).astype(d_q.dtype)
            d_cols *= sheets.slope(scheme) * sheets.scales(scheme, cols)[1]
            d_vals *= sheets.survivors(scheme)
            if sums:
                sums[0][:keys, lanes] += d_cols
                sums[1][:keys, lanes] += d_vals
            else:
                d_k[0, :, lanes] = d_cols.astype(d_k.dtype)
                d_v[0, :, lanes] = d_vals.astype(d_v.dtype)

    _by_prefix(scheme, plan, scalars, query_ids, key_ids, block)
    if sums:

        @pl.when(index == last)
        def _():
            d_k[0] = sums[0][...].astype(d_k.dtype)
            d_v[0] = sums[1][...].astype(d_v.dtype)


def _tiles(plan: Plan):
    """Yields the number and the lanes of each tile of a grid step."""
    for tile in range(plan.tiles):
        yield tile, pl.ds(tile * plan.lanes, plan.lanes)


def _by_prefix(
    scheme: Scheme, plan: Plan, scalars, query_ids, key_ids, block: Callable[[Sheet], None]
) -> None:
    """Runs the block of a grid step on the keys that its queries can see."""
    batch, heads, index = (pl.program_id(axis) for axis in range(3))

    def sheet(keys: int) -> Any:
        size = (keys, plan.block_q)
        first = (batch, heads * plan.step_heads, index * plan.block_q, 0)
        return Sheet(scheme, plan, scalars, *first, size, query_ids, key_ids)

    prefixes = plan.prefixes()
    if len(set(prefixes)) == 1:
        block(sheet(prefixes[0]))
        return
    for number, keys in enumerate(prefixes):
        pl.when(index == number)(functools.partial(lambda keys: block(sheet(keys)), keys))
