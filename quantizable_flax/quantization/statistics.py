"""Outlier statistics of one tensor, per sample (arXiv 2306.12929, section 5)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, inline=True)
def inf_norm(x: jax.Array) -> jax.Array:
    """max|x| of each sample: [B, ...] -> float32 [B]."""
    return jnp.max(jnp.abs(_rows(x)), axis=-1)


@functools.partial(jax.jit, inline=True)
def kurtosis(x: jax.Array) -> jax.Array:
    """`mean((x - mu)^4) / (s^4 + 1e-6)` of each sample, s unbiased: [B, ...] -> float32 [B]."""
    x = _rows(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    squared = centred * centred
    variance = jnp.sum(squared, axis=-1) / (x.shape[-1] - 1)
    return jnp.mean(squared * squared, axis=-1) / (variance * variance + 1e-6)


def token_mean(statistic: Callable[[jax.Array], jax.Array], x_BxTxD: jax.Array) -> jax.Array:
    """The statistic of each token's features, averaged over each sample's tokens: float32 [B]."""
    per_token = statistic(x_BxTxD.reshape(-1, x_BxTxD.shape[-1]))
    return jnp.mean(per_token.reshape(x_BxTxD.shape[0], -1), axis=-1)


def zero_share(probs: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Share of the visible attention probabilities that are exactly 0: [B, H, T, S] -> [B]."""
    zero = (probs == 0.0).astype(jnp.float32)
    if mask is None:
        return jnp.mean(zero, axis=(1, 2, 3))
    seen = jnp.broadcast_to(mask, probs.shape).astype(jnp.float32)
    return jnp.sum(zero * seen, axis=(1, 2, 3)) / jnp.maximum(jnp.sum(seen, axis=(1, 2, 3)), 1.0)


def _rows(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).reshape(x.shape[0], -1)
