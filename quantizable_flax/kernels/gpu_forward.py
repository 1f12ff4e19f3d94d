"""The forward kernel for Hopper GPUs.

Two sweeps over the blocks of keys where probabilities are clipped, for a clip needs the final
sum: one for the log-sum-exp, one for the product with the values. With every key in one block
the scores stay in registers between the two. The plain softmax takes the usual single sweep.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from quantizable_flax.kernels import gpu_parts as parts
from quantizable_flax.kernels import gpu_scores as steps
from quantizable_flax.kernels.gpu_parts import BY_ROW, ROWS, TILE, Plan, Ring, Rows
from quantizable_flax.kernels.gpu_scores import LOG2E, LOWEST, Place


class Scratch(NamedTuple):
    """Shared memory: of each warpgroup its queries (later O), U and L, and the rings."""

    own: Any
    own_weighed: Any
    own_sum: Any
    loaded: Any
    keys: Any
    values: Any


def attend(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, *, training: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns O [B, T, H, K], L in units of log 2 [B, H, T'] and, if it is not O, U."""
    through = training and plan.scheme.clips
    size = 64 if plan.width > 64 else 128
    blocks = pl.cdiv(plan.keys, size)
    stages = min(2 if plan.width > 64 else 3, blocks)
    ids = [] if rows.key_ids is None else [plgpu.SMEM((stages, size), jnp.int32)]
    own = parts.tiled(parts.WARPGROUPS, ROWS, plan.width)
    block = parts.tiled(stages, size, plan.width)
    result = jax.ShapeDtypeStruct(q.shape, v.dtype)
    sums = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.padded_queries), jnp.float32)
    scratch = Scratch(
        own,
        own if through else None,
        plgpu.SMEM((parts.WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=parts.WARPGROUPS),
        Ring.scratch(stages, block, *ids),
        Ring.scratch(stages, block),
    )
    return parts.launch(
        functools.partial(_kernel, plan, size, blocks == 1),
        plan.padded_queries // TILE,
        plan,
        [result, sums, result if through else None],
        scratch,
    )(q, k, v, rows)


def _kernel(plan, size, single, here, q, k, v, rows, out, logsumexp, weighed, scratch):
    blocks = steps.key_blocks(plan, rows, here.tile, size)
    before = blocks if plan.scheme.clips and not single else 0  # steps without values

    def copy():
        @pl.loop(0, before + blocks)
        def _step(step):
            start = jax.lax.rem(step, blocks) * size
            columns = [x for x in (k, rows.key_ids) if x is not None]
            scratch.keys.fill(step, [here.block(x, start, size) for x in columns])

            @pl.when(step >= before)
            def _values():
                scratch.values.fill(step - before, [here.block(v, start, size)])

        scratch.keys.drain(before + blocks)
        scratch.values.drain(blocks)

    def compute():
        own = scratch.own.at[here.warpgroup]
        loaded = scratch.loaded.at[here.warpgroup]
        plgpu.copy_gmem_to_smem(here.rows(q), own, loaded)
        query_ids = here.vector(rows.query_ids)
        words = [here.vector(x) for x in rows.words or ()]
        plgpu.barrier_wait(loaded)

        def scores(step):
            place = Place(here.first, jax.lax.rem(step, blocks) * size, 1, rows.query_offset())
            block_k, *ids = scratch.keys.take(step)
            (found,) = parts.products((own, block_k))
            key_ids = parts.load(ids[0], parts.BY_COLUMN) if ids else None
            scratch.keys.release(step)
            return steps.hide(plan, found, place, (query_ids, key_ids)), place

        sink = None if rows.sink is None else rows.sink[here.head]
        weigh = functools.partial(_weights, plan, words, weighed is not None)
        sweep = (
            functools.partial(_clipped, single, weighed is not None)
            if plan.scheme.clips
            else _plain
        )
        results, total = sweep(plan, blocks, _start(sink), scores, weigh, scratch.values)
        stores = [(results[0], own, here.rows(out))]
        if weighed is not None:
            own_weighed = scratch.own_weighed.at[here.warpgroup]
            stores.append((results[1], own_weighed, here.rows(weighed)))
        sums = here.block(logsumexp, here.first, ROWS)
        parts.store([*stores, (total, scratch.own_sum.at[here.warpgroup], sums)])

    parts.by_role(here, copy, compute)


def _start(sink):
    """Running maximum, in units of log 2, and sum of a row: the sink is its first entry."""
    if sink is None:
        return parts.full((ROWS,), LOWEST, BY_ROW), parts.full((ROWS,), 0.0, BY_ROW)
    return parts.full((ROWS,), sink * LOG2E, BY_ROW), parts.full((ROWS,), 1.0, BY_ROW)


def _advance(scheme, found, highest, total):
    """The running maximum and sum with a block more, its exponentials, and the sum's old scale."""
    scores, place = found
    new = jnp.maximum(highest, jnp.max(scores, axis=1) * (scheme.scale * LOG2E))
    old_scale = jnp.exp2(highest - new)
    # Of a row that has seen nothing so far, the difference could be anything.
    exps = steps.exponentials(scheme, scores, jnp.where(_blind(new), 0.0, new), place)
    return new, total * old_scale + jnp.sum(exps, axis=1), exps, old_scale


def _logsumexp(highest, total):
    """In units of log 2; infinite where a row sees nothing."""
    return jnp.where(_blind(highest), jnp.inf, highest + jnp.log(total) * LOG2E)


def _blind(highest):
    return highest < 1e-10 * LOWEST


def _weights(plan, words, through, probs, place):
    """What to multiply the values with, bfloat16: for O and, where wanted, for U."""
    drop = steps.dropout(plan, words, place, probs.shape)
    clipped, where_inside = steps.clip(plan.scheme, probs)
    weights = [clipped, where_inside(probs)] if through else [clipped]
    return [drop(x).astype(jnp.bfloat16) for x in weights]


def _clipped(single, through, plan, blocks, start, scores, weigh, values):
    """Two sweeps -> ([O, U or nothing], L)."""
    scheme = plan.scheme
    if single:
        found = scores(jnp.int32(0))
        highest, total, *_ = _advance(scheme, found, *start)
    else:

        def first_sweep(step, carry):
            return _advance(scheme, scores(step), *carry)[:2]

        highest, total = jax.lax.fori_loop(0, blocks, first_sweep, start)
    logsumexp = _logsumexp(highest, total)

    def add(step, found, sums):
        probs = steps.exponentials(scheme, found[0], logsumexp, found[1])
        weights = weigh(probs, found[1])
        (block_v,) = values.take(step)
        for weight, total in zip(weights, sums, strict=True):
            plgpu.wgmma(total, weight, block_v)
        plgpu.wgmma_wait(0)
        values.release(step)

    def second_sweep(*sums):
        if single:
            add(jnp.int32(0), found, sums)
        else:

            @pl.loop(0, blocks)
            def _step(step):
                add(step, scores(blocks + step), sums)

        return [total[...] for total in sums]

    factors = (1.0 / plan.keep, plan.stretch)[: 2 if through else 1]
    sums = pl.run_scoped(second_sweep, *[parts.accumulator(ROWS, plan.width)] * len(factors))
    return [total * factor for total, factor in zip(sums, factors, strict=True)], logsumexp


def _plain(plan, blocks, start, scores, weigh, values):
    """One sweep -> ([O], L)."""

    def advance(step, carry):
        highest, total, out = carry
        found = scores(step)
        highest, total, exps, old_scale = _advance(plan.scheme, found, highest, total)
        (weights,) = weigh(exps, found[1])
        (block_v,) = values.take(step)

        def multiply(new):
            plgpu.wgmma(new, weights, block_v)
            return new[...]

        new = pl.run_scoped(multiply, parts.accumulator(*out.shape))
        values.release(step)
        return highest, total, out * found[1].by_query(old_scale, out.shape) + new

    zeros = parts.full((ROWS, plan.width), 0.0, parts.WGMMA)
    highest, total, out = jax.lax.fori_loop(0, blocks, advance, (*start, zeros))
    inverse = jnp.where(_blind(highest), 0.0, 1.0 / (total * plan.keep))
    return [out * jax.lax.broadcast_in_dim(inverse, out.shape, [0])], _logsumexp(highest, total)
