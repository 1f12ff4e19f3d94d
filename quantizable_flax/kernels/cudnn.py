"""The attention of the ordinary softmax by cuDNN, through JAX: NVIDIA GPUs from Ampere on, bf16."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from quantizable_flax.kernels.scheme import Extras, Scheme

IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"
OLDEST = (8, 0)  # compute capability


def supports(scheme: Scheme, *qkv: jax.Array) -> str | None:
    """Why cuDNN cannot compute an attention without ids and sinks here, None if it can."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0.0"))
    if device.platform != "gpu" or tuple(map(int, capability.split("."))) < OLDEST:
        return f"no NVIDIA GPU of Ampere or later (found {device.device_kind})"
    if scheme.clips:
        return "a clipped softmax"
    wrong = [x.dtype.name for x in qkv if x.dtype != jnp.bfloat16]
    if wrong:
        return f"operands are not bfloat16 (found {wrong[0]})"
    width = qkv[0].shape[-1]
    return (
        f"heads of a width not in 8, 16, ..., 128 (found {width})"
        if width % 8 or width > 128
        else None
    )


def forward(
    scheme: Scheme, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, training: bool
) -> tuple[jax.Array, Any]:
    """Returns [B, T, H, K] in v's dtype, and what `backward` needs (None unless training)."""
    del extras

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scheme.scale, is_causal=scheme.causal, implementation=IMPLEMENTATION
        )

    return jax.vjp(attend, q, k, v) if training else (attend(q, k, v), None)


def backward(
    scheme: Scheme,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    saved: Any,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Returns the gradients of q, k, v, in their dtypes, and None for the sink."""
    del scheme, q, k, v, extras
    return (*saved(d_out), None)
