"""Attention with whole matrices in float64, by the formulas of `kernels.scheme`."""

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.kernels.random_bits import kept, row_words
from quantizable_flax.kernels.scheme import Extras, Scheme, visible


def unfused(scheme: Scheme, q, k, v, extras: Extras) -> jax.Array:
    """[B, T, H, K], in the dtype of q; its gradients are derived by JAX."""
    stretched, seen = stretched_probs(scheme, q, k, extras)
    clipped = jnp.where(stretched < 0, 0.0, jnp.where(stretched > 1, 1.0, stretched))
    clipped = jnp.where(seen, clipped, 0.0)
    if scheme.dropout_rate:
        keep = dropout_mask(scheme, extras, clipped.shape)
        clipped = jnp.where(keep, clipped / (1 - scheme.dropout_rate), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", clipped, v)


def stretched_probs(scheme: Scheme, q, k, extras: Extras) -> tuple[jax.Array, jax.Array]:
    """[B, H, T, S]: probabilities stretched and not yet clipped, and which keys are seen."""
    scores = scheme.scale * jnp.einsum("BTHK,BSHK->BHTS", q, k)
    indices = (np.arange(x.shape[1], dtype=np.int32) for x in (q, k))
    seen = visible(scheme, extras, *indices)
    seen = jnp.ones(scores.shape, bool) if seen is None else jnp.broadcast_to(seen, scores.shape)
    # The sink is a key more, whose column is dropped.
    sink = jnp.full(q.shape[2], -jnp.inf) if extras.sink is None else extras.sink
    sink = sink[None, :, None, None].astype(scores.dtype)
    sink = jnp.broadcast_to(sink, (*scores.shape[:3], 1))
    blind = ~seen.any(-1, keepdims=True) & jnp.isinf(sink)
    joined = jnp.concatenate([jnp.where(seen | blind, scores, -jnp.inf), sink], axis=-1)
    probs = jnp.where(seen, jax.nn.softmax(joined, axis=-1)[..., :-1], 0.0)
    gamma = gammas(scheme, seen)
    return (scheme.zeta - gamma) * probs + gamma, seen


def gammas(scheme: Scheme, seen: jax.Array) -> float | np.ndarray:
    """The lower stretch, of each row [B, H, T, 1] where there is an alpha."""
    if not scheme.alpha:
        return scheme.gamma
    return -scheme.alpha / np.maximum(np.asarray(seen).sum(-1, keepdims=True), 1).astype(float)


def on_the_edge(scheme: Scheme, q, k, extras: Extras) -> jax.Array:
    """[B, T, H, 1]: rows where float32 could see an entry on the other side of a bound.

    Its gradient jumps there, so that neither of the two is wrong.
    """
    if not scheme.clips:
        return jnp.zeros((*q.shape[:3], 1), bool)
    stretched, seen = stretched_probs(scheme, q, k, extras)
    nearest = jnp.abs(stretched)
    if scheme.zeta > 1:  # else 1 is reached by rows of a single key, which pass no gradient anyway
        nearest = jnp.minimum(nearest, jnp.abs(stretched - 1))
    near = seen & (nearest < 1e-5 * jnp.abs(stretched - gammas(scheme, seen)))
    return jnp.swapaxes(jnp.any(near, axis=-1), 1, 2)[..., None]


def dropout_mask(scheme: Scheme, extras: Extras, shape) -> jax.Array:
    batch, head, query, key = np.indices(shape, np.int32)
    first = (0, 0, 0) if extras.first is None else extras.first
    words = row_words(extras.seed, batch + first[0], head + first[1], query + first[2])
    return kept(words, key, scheme.dropout_rate)
