"""The backward kernels for Hopper GPUs: one by tiles of queries for dQ, one by tiles of keys for
dK and dV, in which scores and all that follows from them are transposed.

Both compute probabilities anew from the log-sum-exp L. Their sums leave out the constant factors
of the scores' scale, of the stretch and of dropout, which the results take once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from quantizable_flax.kernels import gpu_parts as parts
from quantizable_flax.kernels import gpu_scores as steps
from quantizable_flax.kernels.gpu_parts import BY_COLUMN, ROWS, TILE, Plan, Ring, Rows
from quantizable_flax.kernels.gpu_scores import Place

Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
QUERIES = 64  # in a block that the kernel of dK and dV looks at


class Scratch(NamedTuple):
    """Shared memory: of each warpgroup its q and dO, or its k and v; the blocks it looks at."""

    own: Any
    loaded: Any
    ring: Ring


def gradients(
    plan: Plan, arrays: Arrays, rows: Rows, logsumexp: jax.Array, weighted: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dQ, dK, dV.

    Args:
      plan, rows: of the forward kernel.
      arrays: q, k, v and dO.
      logsumexp: L in units of log 2, [B, H, T'].
      weighted: D divided by `plan.stretch`, float32 [B, H, T'].
    """
    q, k, v, _ = arrays
    own = (parts.tiled(parts.WARPGROUPS, ROWS, plan.width),) * 2
    loaded = plgpu.Barrier(num_arrivals=2, num_barriers=parts.WARPGROUPS)

    size = 64 if plan.width > 64 else 128
    stages = min(2, pl.cdiv(plan.keys, size))
    blocks = [parts.tiled(stages, size, plan.width)] * 2
    ids = [] if rows.key_ids is None else [plgpu.SMEM((stages, size), jnp.int32)]
    (d_q,) = parts.launch(
        functools.partial(_queries_kernel, plan, size),
        plan.padded_queries // TILE,
        plan,
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        Scratch(own, loaded, Ring.scratch(stages, *blocks, *ids)),
    )(*arrays, rows, logsumexp, weighted)

    stages = min(2, pl.cdiv(plan.queries, QUERIES))
    blocks = [parts.tiled(stages, QUERIES, plan.width)] * 2
    dtypes = [jnp.float32] * 2 + [jnp.uint32] * len(rows.words or ())
    dtypes += [] if rows.query_ids is None else [jnp.int32]
    vectors = [plgpu.SMEM((stages, QUERIES), dtype) for dtype in dtypes]
    d_k, d_v = parts.launch(
        functools.partial(_keys_kernel, plan),
        pl.cdiv(plan.keys, TILE),
        plan,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        Scratch(own, loaded, Ring.scratch(stages, *blocks, *vectors)),
    )(*arrays, rows, logsumexp, weighted)
    return d_q, d_k, d_v


def _load_own(here, scratch, *refs):
    """Starts copying the warpgroup's own rows -> (their buffers, the barrier to wait at)."""
    own = [buffers.at[here.warpgroup] for buffers in scratch.own]
    loaded = scratch.loaded.at[here.warpgroup]
    for ref, buffer in zip(refs, own, strict=True):
        plgpu.copy_gmem_to_smem(here.rows(ref), buffer, loaded)
    return own, loaded


def _queries_kernel(plan, size, here, q, k, v, d_out, rows, logsumexp, weighted, d_q, scratch):
    blocks = steps.key_blocks(plan, rows, here.tile, size)

    def copy():
        @pl.loop(0, blocks)
        def _step(step):
            columns = [x for x in (k, v, rows.key_ids) if x is not None]
            scratch.ring.fill(step, [here.block(x, step * size, size) for x in columns])

        scratch.ring.drain(blocks)

    def compute():
        own, loaded = _load_own(here, scratch, q, d_out)
        vectors = [here.vector(x) for x in (logsumexp, weighted, rows.query_ids)]
        words = [here.vector(x) for x in rows.words or ()]
        plgpu.barrier_wait(loaded)

        def add(total, step):
            place = Place(here.first, step * size, 1, rows.query_offset())
            block_k, block_v, *ids = scratch.ring.take(step)
            scores, d_weights = parts.products((own[0], block_k), (own[1], block_v))
            key_ids = parts.load(ids[0], BY_COLUMN) if ids else None
            scores = steps.hide(plan, scores, place, (vectors[2], key_ids))
            probs = steps.exponentials(plan.scheme, scores, vectors[0], place)
            drop = steps.dropout(plan, words, place, probs.shape)
            where_inside = steps.clip(plan.scheme, probs)[1]
            d_probs = drop(where_inside(d_weights))
            d_scores = probs * (d_probs - place.by_query(vectors[1], probs.shape))
            plgpu.wgmma(total, d_scores.astype(q.dtype), block_k)
            plgpu.wgmma_wait(0)
            scratch.ring.release(step)

        def sweep(total):
            @pl.loop(0, blocks)
            def _step(step):
                add(total, step)

            return total[...]

        total = pl.run_scoped(sweep, parts.accumulator(ROWS, plan.width))
        parts.store([(total * (plan.scheme.scale * plan.stretch), own[0], here.rows(d_q))])

    parts.by_role(here, copy, compute)


def _keys_kernel(plan, here, q, k, v, d_out, rows, logsumexp, weighted, d_k, d_v, scratch):
    start = steps.first_query_block(plan, rows, here.tile, QUERIES)
    blocks = pl.cdiv(plan.queries, QUERIES) - start
    columns = [q, d_out, logsumexp, weighted, *(rows.words or ())]
    columns += [] if rows.query_ids is None else [rows.query_ids]

    def copy():
        @pl.loop(0, blocks)
        def _step(step):
            first = (start + step) * QUERIES
            scratch.ring.fill(step, [here.block(x, first, QUERIES) for x in columns])

        scratch.ring.drain(blocks)

    def compute():
        own, loaded = _load_own(here, scratch, k, v)
        key_ids = here.vector(rows.key_ids)
        plgpu.barrier_wait(loaded)

        def add(total_k, total_v, step):
            place = Place((start + step) * QUERIES, here.first, 0, rows.query_offset())
            block_q, block_d_out, *vectors = scratch.ring.take(step)
            (scores,) = parts.products((own[0], block_q))
            logsumexp, weighted, *words = (parts.load(x, BY_COLUMN) for x in vectors)
            query_ids = None if key_ids is None else words.pop()
            scores = steps.hide(plan, scores, place, (query_ids, key_ids))
            probs = steps.exponentials(plan.scheme, scores, logsumexp, place)
            drop = steps.dropout(plan, words, place, probs.shape)
            clipped, where_inside = steps.clip(plan.scheme, probs)
            weights = drop(clipped).astype(v.dtype)

            def multiply(d_weights):
                plgpu.wgmma(d_weights, own[1], block_d_out.T)
                plgpu.wgmma(total_v, weights, block_d_out)
                # The product for dV may go on meanwhile.
                return plgpu.wgmma_accumulator_load(d_weights, wait_n=1)

            d_weights = pl.run_scoped(multiply, parts.accumulator(*probs.shape))
            d_probs = drop(where_inside(d_weights))
            d_scores = probs * (d_probs - place.by_query(weighted, probs.shape))
            plgpu.wgmma(total_k, d_scores.astype(k.dtype), block_q)
            plgpu.wgmma_wait(0)
            scratch.ring.release(step)

        def sweep(total_k, total_v):
            @pl.loop(0, blocks)
            def _step(step):
                add(total_k, total_v, step)

            factor = plan.scheme.scale * plan.stretch
            return total_k[...] * factor, total_v[...] * (1.0 / plan.keep)

        sums = pl.run_scoped(sweep, *[parts.accumulator(ROWS, plan.width)] * 2)
        places = (here.rows(d_k), here.rows(d_v))
        parts.store(list(zip(sums, own, places, strict=True)))

    parts.by_role(here, copy, compute)
