"""TPU kernels over blocks of keys, backwards.

One kernel goes over the keys and, inside, the queries, whose gradients stay on the chip if they
fit; else they have a kernel of their own, which computes the scores once more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quantizable_flax.kernels import tpu_call, tpu_plan
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.kernels.tpu_blocks import Saved, key_block, query_block, sees, step_sheet
from quantizable_flax.kernels.tpu_gradients import scaled, tile_gradients
from quantizable_flax.kernels.tpu_plan import Plan
from quantizable_flax.kernels.tpu_sheet import slope
from quantizable_flax.kernels.tpu_tile import clear

# Bytes of gradients of the queries of a tile, and of blocks beside them, that may be on the chip.
RESIDENT = 9 * 2**20


def backward(
    scheme: Scheme,
    plan: Plan,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    saved: Saved,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Packed gradients of q, k and v, and D, [B, heads, 1, T]."""
    q = arrays[0]
    logsumexp, passing = saved
    weighted = d_out.astype(jnp.float32) * passing.astype(jnp.float32)
    weighted = weighted.reshape(*q.shape[:2], plan.all_heads, plan.head_width).sum(-1)
    weighted = jnp.swapaxes(weighted, 1, 2)[:, :, None]
    operands = (
        *(tpu_plan.scalars(extras), *arrays, *tpu_plan.ids_and_sink(plan, extras)[:2]),
        *(logsumexp, weighted / slope(scheme), d_out),
    )
    run = functools.partial(_backward, scheme, plan, extras, operands)
    resident = plan.grid[2] * plan.block_q * plan.lanes * 4
    if resident + plan.step_bytes(q.dtype.itemsize) <= RESIDENT:
        d_q, d_k, d_v = run(of_queries=True, of_keys=True)
    else:
        d_q, _, _ = run(of_queries=True, of_keys=False)
        _, d_k, d_v = run(of_queries=False, of_keys=True)
    return d_q, d_k, d_v, weighted


def _backward(scheme, plan, extras, operands, *, of_queries, of_keys):
    """Keys are the outer of the two axes if their gradients are wanted, else the queries."""
    _, q, k, v = operands[:4]
    blocks_q, blocks_k = plan.grid[2:]

    def written(i, j, ref):  # the gradients of queries are complete with the last keys
        return jnp.where(i == blocks_k - 1, j, 0) if of_keys else i

    specs = tpu_call.Specs(
        plan,
        query=(lambda j, i, ref: query_block(plan, i, j, ref)) if of_keys else lambda i, j, ref: i,
        key=(lambda j, i, ref: j) if of_keys else functools.partial(key_block, plan),
    )
    d_queries = tpu_call.Specs(plan, query=written, key=specs.key).queries()
    slots = blocks_q if of_keys else 1
    scratch: list[Any] = []
    if of_queries:
        scratch.append(pltpu.VMEM((slots, plan.lanes, plan.block_q), jnp.float32))
    if of_keys:
        scratch += [pltpu.VMEM((plan.block_k, plan.lanes), jnp.float32)] * 2
    nothing = (None, None)
    return tpu_call.call(
        functools.partial(_backward_kernel, scheme, plan, of_queries, of_keys),
        plan,
        operands,
        [
            *(specs.queries(), specs.keys(), specs.keys()),
            *specs.ids_and_sink(extras)[:2],
            *(specs.rows(), specs.rows(), specs.queries()),
        ],
        [
            (jax.ShapeDtypeStruct(q.shape, q.dtype), d_queries) if of_queries else nothing,
            (jax.ShapeDtypeStruct(k.shape, k.dtype), specs.keys()) if of_keys else nothing,
            (jax.ShapeDtypeStruct(v.shape, v.dtype), specs.keys()) if of_keys else nothing,
        ],
        name=f"attention_blocks_backward{'_q' * of_queries}{'_kv' * of_keys}",
        grid=(*plan.grid[:2], *((blocks_k, blocks_q) if of_keys else (blocks_q, blocks_k))),
        products=2 + of_queries + 2 * of_keys,
        scratch=tuple(scratch),
        carries=2 if of_queries and of_keys else 1,
    )


def _backward_kernel(
    scheme, plan, of_queries, of_keys, scalars, q, k, v, query_ids, key_ids, logsumexp, weighted,
    d_out, d_q, d_k, d_v, *scratch,
):  # fmt: skip
    outer, inner = pl.program_id(2), pl.program_id(3)
    i, j = (inner, outer) if of_keys else (outer, inner)
    sums_q: Any = scratch[0] if of_queries else None
    sums_kv = scratch[of_queries:]
    slot = i if of_keys else 0
    lies = step_sheet(scheme, plan, scalars, i, j, query_ids, key_ids)

    def compute():
        refs = (q, k, v, logsumexp, weighted, d_out)
        found = tile_gradients(lies, 0, refs, of_queries=of_queries, of_keys=of_keys)
        if of_queries:
            sums_q[slot] += found.queries
        if of_keys:
            sums_kv[0][...] += found.keys
            sums_kv[1][...] += found.values

    def write_queries():
        d_q[0] = scaled(scheme, q.dtype, sums_q[slot], None, None)[0].astype(d_q.dtype)

    def write_keys():
        sums = (ref[...] for ref in sums_kv)
        _, keys, values = scaled(scheme, q.dtype, None, *sums)
        d_k[0], d_v[0] = keys.astype(d_k.dtype), values.astype(d_v.dtype)

    if of_queries:
        pl.when(j == 0)(lambda: clear(sums_q.at[slot]))
    if of_keys:
        pl.when(i == 0)(lambda: clear(*sums_kv))
    pl.when(sees(plan, i, j, scalars))(compute)
    if of_queries:
        pl.when(j == plan.grid[3] - 1)(write_queries)
    if of_keys:
        pl.when(i == plan.grid[2] - 1)(write_keys)
