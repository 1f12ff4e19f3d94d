"""Fused attention for Hopper GPUs (H100, H200) with Pallas on Mosaic GPU; bfloat16."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from quantizable_flax.kernels import blockwise
from quantizable_flax.kernels.random_bits import row_words
from quantizable_flax.kernels.scheme import HIDDEN, Extras, Scheme

WIDTHS = (64, 128)


def supports(scheme: Scheme, *qkv: jax.Array) -> str | None:
    """Why the kernels cannot compute an attention here, None if they can."""
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        return f"no Hopper GPU (found {device.device_kind})"
    wrong = [x.dtype.name for x in qkv if x.dtype != jnp.bfloat16]
    if wrong:
        return f"operands are not bfloat16 (found {wrong[0]})"
    if (width := qkv[0].shape[-1]) not in WIDTHS:
        return f"heads are not {' or '.join(map(str, WIDTHS))} wide (found {width})"
    return f"the scale is not above 0 (found {scheme.scale})" if scheme.scale <= 0 else None


def forward(
    scheme: Scheme, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, training: bool
) -> tuple[jax.Array, Any]:
    """Returns [B, T, H, K] in v's dtype, and what `backward` needs (None unless training)."""
    from quantizable_flax.kernels import gpu_forward  # Mosaic GPU is loaded when it is used

    plan, rows = _prepared(scheme, q, k, extras)
    out, logsumexp, weighed = gpu_forward.attend(
        plan, _in_eights(q), _in_eights(k), _in_eights(v), rows, training=training
    )
    saved = (logsumexp, out if weighed is None else weighed)
    return out[:, : q.shape[1]], saved if training else None


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
    from quantizable_flax.kernels import gpu_backward

    plan, rows = _prepared(scheme, q, k, extras)
    logsumexp, weighed = saved
    d_out = _in_eights(d_out.astype(v.dtype))
    weighted_BxTxH = jnp.sum(weighed.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    weighted = _padded(jnp.swapaxes(weighted_BxTxH, 1, 2), plan.padded_queries, 0)
    arrays = (_in_eights(q), _in_eights(k), _in_eights(v), d_out)
    # Constant factors are left to the end, there as in D.
    d_q, d_k, d_v = gpu_backward.gradients(
        plan, arrays, rows, logsumexp, weighted * (1.0 / plan.stretch)
    )
    d_sink = blockwise.sink_gradient(extras.sink, logsumexp * math.log(2), weighted)
    return d_q[:, : q.shape[1]], d_k[:, : k.shape[1]], d_v[:, : v.shape[1]], d_sink


def _in_eights(x: jax.Array) -> jax.Array:
    """Appends zeros to the second axis: the hardware copies whole tiles of 8 rows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def _prepared(scheme: Scheme, q: jax.Array, k: jax.Array, extras: Extras) -> tuple[Any, Any]:
    """(`gpu_parts.Plan`, `gpu_parts.Rows`) of a call."""
    from quantizable_flax.kernels import gpu_parts as parts

    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    plan = parts.Plan(scheme, batch, queries, keys, heads, width)
    first = jnp.zeros(3, jnp.int32) if extras.first is None else extras.first
    query_ids = key_ids = words = None
    if extras.query_ids is not None and extras.key_ids is not None:
        # A query of the id HIDDEN sees nothing either: it gets one that no key has.
        query_ids = _padded(extras.query_ids, plan.padded_queries, HIDDEN)
        query_ids = jnp.where(query_ids == HIDDEN, jnp.iinfo(jnp.int32).min, query_ids)
        key_ids = _padded(extras.key_ids, -(-keys // parts.TILE) * parts.TILE, HIDDEN)
    if scheme.dropout_rate:
        assert extras.seed is not None  # `fused_attention` asks for it
        words = row_words(
            extras.seed,
            (jnp.arange(batch, dtype=jnp.int32) + first[0])[:, None, None],
            (jnp.arange(heads, dtype=jnp.int32) + first[1])[None, :, None],
            (jnp.arange(plan.padded_queries, dtype=jnp.int32) + first[2])[None, None, :],
        )
    offset = first[2:] if scheme.causal and extras.first is not None else None
    return plan, parts.Rows(query_ids, key_ids, words, extras.sink, offset)


def _padded(x: jax.Array, size: int, value: int) -> jax.Array:
    """Appends `value` to the last axis up to `size`."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=value)
