"""Fused attention in Pallas kernels for TPUs: whole rows of scores, or blocks of keys."""

from typing import Any

import jax

from quantizable_flax.kernels import tpu_blocks, tpu_blocks_backward, tpu_rows
from quantizable_flax.kernels.blockwise import sink_gradient
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.kernels.tpu_plan import packed, plan_of, unpacked

WIDEST = 256  # heads; wider ones fill the memory of a chip


def supports(scheme: Scheme, *qkv: jax.Array) -> str | None:
    """Why the kernels cannot compute this, in words; None if they can."""
    del scheme
    dtypes = {x.dtype.name for x in qkv}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands are not all float32 or bfloat16 (found {', '.join(sorted(dtypes))})"
    if (width := qkv[0].shape[-1]) > WIDEST:
        return f"heads are wider than {WIDEST} (found {width})"
    return None


def forward(
    scheme: Scheme, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, training: bool
) -> tuple[jax.Array, Any]:
    """Returns [B, T, H, K] in v's dtype, and what `backward` needs (None unless training)."""
    plan = plan_of(scheme, q, k, extras)
    arrays = tuple(packed(plan, x) for x in (q, k, v))
    program = tpu_rows if plan.whole_rows else tpu_blocks
    out, saved = program.forward(scheme, plan, arrays, extras, training=training)
    return unpacked(plan, out), saved


def backward(
    scheme: Scheme,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    saved: Any,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns the gradients of q, k, v, in their dtypes, and of the sink, float32 or None."""
    plan = plan_of(scheme, q, k, extras)
    arrays = tuple(packed(plan, x) for x in (q, k, v))
    program = tpu_rows if plan.whole_rows else tpu_blocks_backward
    *gradients, weighted = program.backward(
        scheme, plan, arrays, extras, saved, packed(plan, d_out)
    )
    d_q, d_k, d_v = (unpacked(plan, x) for x in gradients)
    d_sink = None
    if extras.sink is not None:
        logsumexp = saved if plan.whole_rows else saved[0]
        by_head = (x[:, : plan.heads, 0] for x in (logsumexp, weighted))
        d_sink = sink_gradient(extras.sink, *by_head)
    return d_q, d_k, d_v, d_sink
