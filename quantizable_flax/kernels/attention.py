"""`fused_attention`: one interface, with gradients, over the programs that compute it."""

import functools
from typing import Any

import jax

from quantizable_flax.errors import UserError
from quantizable_flax.kernels import blockwise, cudnn, gpu, tpu
from quantizable_flax.kernels.scheme import NO_EXTRAS, Extras, Scheme

PATHS: dict[str, Any] = {"blockwise": blockwise, "cudnn": cudnn, "gpu": gpu, "tpu": tpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused_attention(
    path: str,
    scheme: Scheme,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras = NO_EXTRAS,
) -> jax.Array:
    """Attention as `scheme` and `extras` say, [B, T, H, K] in v's dtype; scores are float32.

    Args:
      path: which program computes it, a key of `PATHS`.
      scheme: what is computed.
      q: [B, T, H, K], k and v: [B, S, H, K]; float32 or bfloat16.
      extras: ids of padding and segments, the sink, dropout's seed.

    Raises:
      UserError: dropout without a seed.
    """
    return _run(path, scheme, q, k, v, extras, training=False)[0]


def _run(path, scheme, q, k, v, extras, *, training):
    if scheme.dropout_rate and extras.seed is None:
        raise UserError("attention dropout needs a seed, found None.")
    return PATHS[path].forward(scheme, q, k, v, extras, training=training)


def _forward(path, scheme, q, k, v, extras=NO_EXTRAS):
    out, saved = _run(path, scheme, q, k, v, extras, training=True)
    return out, (q, k, v, extras, saved)


def _backward(path, scheme, kept, d_out):
    d_q, d_k, d_v, d_sink = PATHS[path].backward(scheme, *kept, d_out)
    # What counts and numbers tokens has no gradient.
    return d_q, d_k, d_v, Extras(sink=d_sink)


fused_attention.defvjp(_forward, _backward)
