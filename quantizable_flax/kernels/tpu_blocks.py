"""TPU kernel over blocks of keys, forwards, for sequences of any length.

Clipped softmax sweeps twice over the keys, first for the log-sum-exp, then for the context and, in
training, for U of `kernels.scheme`; the ordinary softmax sweeps once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quantizable_flax.kernels import tpu_call, tpu_plan
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.kernels.tpu_plan import Plan
from quantizable_flax.kernels.tpu_sheet import (
    LOWEST,
    Sheet,
    both,
    clipped,
    slope,
    survivors,
    through_clip,
    where,
)
from quantizable_flax.kernels.tpu_tile import NN, clear, dot, rows_of_head, transposed

Saved = tuple[jax.Array, jax.Array]  # log-sum-exp [B, heads, 1, T], and U [B, T, lanes]


def forward(
    scheme: Scheme, plan: Plan, arrays: tuple[jax.Array, ...], extras: Extras, *, training: bool
) -> tuple[jax.Array, Saved | None]:
    """Packed q, k, v -> the context [B, T, lanes], and what `backward` needs if training."""
    q, _, v = arrays
    blocks = plan.grid[3]
    sweeps = 2 if scheme.clips else 1

    def key(i, t, ref):
        return key_block(plan, i, jnp.where(t < blocks, t, t - blocks), ref)

    def value(i, t, ref):  # the first of two sweeps has no use for them
        return key_block(plan, i, jnp.maximum(t - (sweeps - 1) * blocks, 0), ref)

    specs = tpu_call.Specs(plan, query=lambda i, t, ref: i, key=key)
    context = (jax.ShapeDtypeStruct(q.shape, v.dtype), specs.queries())
    sums = pltpu.VMEM((plan.lanes, plan.block_q), jnp.float32)
    stats = pltpu.VMEM((plan.tile_heads, plan.block_q), jnp.float32)
    out, logsumexp, passing = tpu_call.call(
        functools.partial(_forward_kernel, scheme, plan),
        plan,
        (tpu_plan.scalars(extras), *arrays, *tpu_plan.ids_and_sink(plan, extras)),
        [specs.queries(), specs.keys(), specs.keys(value), *specs.ids_and_sink(extras)],
        [
            context,
            (plan.rows(), specs.rows()) if training else (None, None),
            context if training and scheme.clips else (None, None),
        ],
        name="attention_blocks_forward",
        grid=(*plan.grid[:3], sweeps * blocks),
        products=2 + (sweeps - 1) * (1 + training),
        scratch=(stats, stats, sums, *((sums,) if training and scheme.clips else ())),
    )
    return out, (logsumexp, passing if scheme.clips else out) if training else None


def _forward_kernel(
    scheme, plan, scalars, q, k, v, query_ids, key_ids, sink, out, logsumexp, passing,
    highest, total, context, passed=None,
):  # fmt: skip
    heads, i, t = (pl.program_id(axis) for axis in (1, 2, 3))
    blocks, steps = plan.grid[3], pl.num_programs(3)
    second = t >= blocks
    j = jnp.where(second, t - blocks, t)
    lies = step_sheet(scheme, plan, scalars, i, j, query_ids, key_ids)
    seen = sees(plan, i, j, scalars)

    @pl.when(t == 0)
    def _():
        # A sink is a key that was seen before.
        for head in range(plan.tile_heads):
            start = LOWEST if sink is None else sink[heads * plan.step_heads + head]
            highest[head : head + 1] = jnp.full((1, plan.block_q), start, jnp.float32)
        total[...] = jnp.full(total.shape, 0.0 if sink is None else 1.0, jnp.float32)
        clear(context, *(() if passed is None else (passed,)))

    if scheme.clips:
        tile = (lies, q, k, None, highest, total, None)
        pl.when(seen & ~second)(functools.partial(_online_softmax, *tile))
    else:
        pl.when(seen)(functools.partial(_online_softmax, lies, q, k, v, highest, total, context))

    @pl.when(t == blocks - 1)
    def _():
        blind = highest[...] == LOWEST
        found = jnp.where(blind, jnp.inf, highest[...] + jnp.log(total[...]))
        total[...] = jnp.where(blind, 0.0, survivors(scheme) / total[...])
        highest[...] = found  # from here on the log-sum-exp
        if logsumexp is not None:
            for head in range(plan.tile_heads):
                logsumexp[0, head] = highest[head : head + 1]

    if scheme.clips:
        sums = (highest, context, passed)
        pl.when(seen & second)(functools.partial(_clipped_softmax, lies, q, k, v, *sums))

    @pl.when(t == steps - 1)
    def _():
        if scheme.clips:
            out[0] = (context[...].T * survivors(scheme)).astype(out.dtype)
        else:
            for head in range(plan.tile_heads):
                rows = slice(head * plan.head_width, (head + 1) * plan.head_width)
                context[rows] = context[rows] * total[head : head + 1]
            out[0] = context[...].T.astype(out.dtype)
        if passing is not None:
            passing[0] = (passed[...].T * slope(scheme)).astype(passing.dtype)


def _online_softmax(sheet: Sheet, q, k, v, highest, total, context) -> None:
    """Takes a block of keys into the running maximum and sum, and the context if there is one."""
    plan, seen = sheet.plan, sheet.seen()
    vals = None if v is None else transposed(sheet.keys_there(v[0]))
    for head in range(plan.tile_heads):
        row = slice(head, head + 1)
        scores = sheet.scores(head, q[0], k[0], seen)
        before = highest[row]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        exps, fade = jnp.exp(scores - now), jnp.exp(before - now)
        highest[row] = now
        total[row] = total[row] * fade + jnp.sum(exps, axis=0, keepdims=True)
        if vals is not None:
            weights = where(sheet.keep(head), exps).astype(v.dtype)
            own = slice(head * plan.head_width, (head + 1) * plan.head_width)
            new = dot(rows_of_head(plan, vals, head), weights, NN)
            context[own] = context[own] * fade + new


def _clipped_softmax(sheet: Sheet, q, k, v, logsumexp, context, passed) -> None:
    """Adds a block of keys to the context, and to what U sums if there is that."""
    scheme, plan, seen = sheet.scheme, sheet.plan, sheet.seen()
    vals = transposed(sheet.keys_there(v[0]))
    for head in range(plan.tile_heads):
        own_vals = rows_of_head(plan, vals, head)
        own = slice(head * plan.head_width, (head + 1) * plan.head_width)
        probs = jnp.exp(sheet.scores(head, q[0], k[0], seen) - logsumexp[head : head + 1])
        stretched, keep = scheme.stretched(probs), sheet.keep(head)
        weights = where(keep, clipped(scheme, stretched)).astype(v.dtype)
        context[own] += dot(own_vals, weights, NN)
        if passed is not None:
            probs = where(both(through_clip(scheme, stretched), keep), probs)
            passed[own] += dot(own_vals, probs.astype(v.dtype), NN)


def ahead(plan: Plan, scalars) -> Any:
    """How many keys more than its index a query sees."""
    return 0 if plan.skips else scalars[4]


def key_block(plan: Plan, i, j, scalars) -> Any:
    """The block of keys to hold for the queries i: j, or the last that they see."""
    if not plan.causal:
        return j
    last = (i + 1) * plan.block_q - 1 + ahead(plan, scalars)
    return jnp.minimum(j, jax.lax.div(last, plan.block_k))


def query_block(plan: Plan, i, j, scalars) -> Any:
    """The block of queries to hold for the keys j: i, or the first that sees them."""
    if not plan.causal:
        return i
    first = jnp.maximum(j * plan.block_k - ahead(plan, scalars), 0)
    return jnp.minimum(jnp.maximum(i, jax.lax.div(first, plan.block_q)), plan.grid[2] - 1)


def sees(plan: Plan, i, j, scalars) -> Any:
    """Whether a query of the block i may see a key of the block j."""
    if not plan.causal:
        return True
    return j * plan.block_k <= (i + 1) * plan.block_q - 1 + ahead(plan, scalars)


def step_sheet(scheme, plan, scalars, i, j, query_ids, key_ids) -> Sheet:
    """Of the queries i and the keys j."""
    first = (
        *(pl.program_id(0), pl.program_id(1) * plan.step_heads),
        *(i * plan.block_q, j * plan.block_k),
    )
    size = (plan.block_k, plan.block_q)
    return Sheet(scheme, plan, scalars, *first, size, query_ids, key_ids)
