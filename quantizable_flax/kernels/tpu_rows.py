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

from quantizable_flax.kernels import tpu_call, tpu_plan
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.kernels.tpu_gradients import scaled, tile_gradients
from quantizable_flax.kernels.tpu_plan import Plan
from quantizable_flax.kernels.tpu_sheet import LOWEST, Sheet, clipped, slope, survivors, where
from quantizable_flax.kernels.tpu_tile import NN, clear, dot, rows_of_head, transposed


def forward(
    scheme: Scheme, plan: Plan, arrays: tuple[jax.Array, ...], extras: Extras, *, training: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Packed q, k, v -> the context [B, T, lanes], and the log-sum-exp [B, heads, 1, T]."""
    specs = _specs(plan)
    q, _, v = arrays
    out, logsumexp = tpu_call.call(
        functools.partial(_forward_kernel, scheme, plan),
        plan,
        (tpu_plan.scalars(extras), *arrays, *tpu_plan.ids_and_sink(plan, extras)),
        [specs.queries(), specs.keys(), specs.keys(), *specs.ids_and_sink(extras)],
        [
            (jax.ShapeDtypeStruct(q.shape, v.dtype), specs.queries()),
            (plan.rows(), specs.rows()) if training else (None, None),
        ],
        name="attention_rows_forward",
        grid=plan.grid,
        products=2,
    )
    return out, logsumexp


def backward(
    scheme: Scheme,
    plan: Plan,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    logsumexp: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Packed gradients of q, k and v, and with a sink D, [B, heads, 1, T]."""
    specs = _specs(plan)
    q, k, v = arrays
    query_ids, key_ids, sink = tpu_plan.ids_and_sink(plan, extras)
    sums = pltpu.VMEM((plan.block_k, plan.tiles * plan.lanes), jnp.float32)
    return tuple(
        tpu_call.call(
            functools.partial(_backward_kernel, scheme, plan),
            plan,
            (tpu_plan.scalars(extras), *arrays, query_ids, key_ids, logsumexp, d_out),
            [
                *(specs.queries(), specs.keys(), specs.keys()),
                *specs.ids_and_sink(extras)[:2],
                *(specs.rows(), specs.queries()),
            ],
            [
                (jax.ShapeDtypeStruct(q.shape, q.dtype), specs.queries()),
                (jax.ShapeDtypeStruct(k.shape, k.dtype), specs.keys()),
                (jax.ShapeDtypeStruct(v.shape, v.dtype), specs.keys()),
                (None, None) if sink is None else (plan.rows(), specs.rows()),
            ],
            name="attention_rows_backward",
            grid=plan.grid,
            products=5,
            scratch=(sums, sums) if plan.grid[2] > 1 else (),
            carries=2,
        )
    )


def _specs(plan: Plan) -> tpu_call.Specs:
    return tpu_call.Specs(plan, query=lambda i, j, ref: i, key=lambda i, j, ref: 0)


def _forward_kernel(scheme, plan, scalars, q, k, v, query_ids, key_ids, sink, out, logsumexp):
    def block(sheet: Sheet):
        seen, keys = sheet.seen(), sheet.size[0]
        for tile in range(plan.tiles):
            lanes = pl.ds(tile * plan.lanes, plan.lanes)
            rows, cols = q[0, :, lanes], k[0, :keys, lanes]
            vals = transposed(sheet.keys_there(v[0, :keys, lanes]))
            contexts = []
            for head in range(plan.tile_heads):
                place = tile * plan.tile_heads + head
                scores = sheet.scores(place, rows, cols, seen)
                extra = None if sink is None else sink[sheet.head + place]
                weights, factor, total = _softmax(scheme, scores, extra, blind=seen is not None)
                weights = where(sheet.keep(place), weights).astype(v.dtype)
                contexts.append(dot(rows_of_head(plan, vals, head), weights, NN) * factor)
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
    if blind:  # some queries may see nothing
        logsumexp = jnp.where(highest == LOWEST, jnp.inf, logsumexp)
        inverse = jnp.where(highest == LOWEST, 0.0, inverse)
    if not scheme.clips:
        return exps, inverse * survivors(scheme), logsumexp
    stretched = exps * (inverse * (scheme.zeta - scheme.gamma)) + scheme.gamma
    return clipped(scheme, stretched), survivors(scheme), logsumexp


def _backward_kernel(
    scheme, plan, scalars, q, k, v, query_ids, key_ids, logsumexp, d_out, d_q, d_k, d_v, weighted,
    *sums,
):  # fmt: skip
    index = pl.program_id(2)
    if sums:
        pl.when(index == 0)(lambda: clear(*sums))

    def block(sheet: Sheet):
        for tile in range(plan.tiles):
            lanes = pl.ds(tile * plan.lanes, plan.lanes)
            found = tile_gradients(sheet, tile, (q, k, v, logsumexp, None, d_out))
            d_rows, d_cols, d_vals = scaled(scheme, q.dtype, *found[:3])
            d_q[0, :, lanes] = d_rows.astype(d_q.dtype)
            if sums:
                keys = slice(sheet.size[0])
                sums[0][keys, lanes] += d_cols
                sums[1][keys, lanes] += d_vals
            else:
                d_k[0, :, lanes] = d_cols.astype(d_k.dtype)
                d_v[0, :, lanes] = d_vals.astype(d_v.dtype)
            if weighted is not None:
                for head, value in enumerate(found.weighted, tile * plan.tile_heads):
                    weighted[0, head] = value * slope(scheme)

    _by_prefix(scheme, plan, scalars, query_ids, key_ids, block)
    if sums:

        @pl.when(index == plan.grid[2] - 1)
        def write():
            d_k[0] = sums[0][...].astype(d_k.dtype)
            d_v[0] = sums[1][...].astype(d_v.dtype)


def _by_prefix(
    scheme: Scheme, plan: Plan, scalars, query_ids, key_ids, block: Callable[[Sheet], None]
) -> None:
    """Runs the block of a grid step on the keys that its queries can see."""
    batch, heads, index = (pl.program_id(axis) for axis in range(3))

    def sheet(keys: int) -> Any:
        first = (batch, heads * plan.step_heads, index * plan.block_q, 0)
        return Sheet(scheme, plan, scalars, *first, (keys, plan.block_q), query_ids, key_ids)

    prefixes = plan.prefixes()
    if len(set(prefixes)) == 1:
        block(sheet(prefixes[0]))
        return
    for keys in sorted(set(prefixes)):
        first = prefixes.index(keys)
        behind = first + prefixes.count(keys)
        run = functools.partial(lambda keys: block(sheet(keys)), keys)
        pl.when((index >= first) & (index < behind))(run)
