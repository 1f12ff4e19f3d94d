"""Softmax and clipped softmax as pure functions of attention scores (arXiv 2306.12929, eq. 4).

A sink takes a share of every row, so that a head can do nothing without a key for it: with a logit
of 0 "softmax1" (Evan Miller, "Attention is off by one", 2023), or learned by head (gpt-oss).
"""

import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.quantization.tensor import beside

BLIND_QUERIES = ("zero", "uniform")

_LOWEST = float(jnp.finfo(jnp.float32).min)


def softmax(
    scores: jax.Array,
    mask: jax.Array | None = None,
    *,
    blind_queries: str = "zero",
    causal: bool = False,
    sink: jax.Array | None = None,
) -> jax.Array:
    """Softmax over the last axis, in float32.

    Args:
      scores: [..., queries, keys], any floating dtype.
      mask: broadcastable to `scores`, True where a key is visible; None shows every key.
      blind_queries: what a query gets that sees no key: "zero", or "uniform" over all keys, masked
        ones included, as in the original implementation.
      causal: with "uniform", whether `mask` is a decoder's; see `_lowered`.
      sink: a logit more for each row, which takes its share and has no key; broadcasts to
        `scores[..., :1]`, as [H, 1, 1]. Zeros add one to the denominator.

    Returns:
      float32 probabilities; a masked key has exactly 0, but for blind queries that are uniform.
    """
    check_choice("attention blind_queries", blind_queries, BLIND_QUERIES)
    scores = scores.astype(jnp.float32)
    if mask is None:
        return _shares(scores, sink)
    mask = beside(mask.astype(bool), scores)
    if blind_queries == "uniform":
        return _shares(_lowered(scores, mask, causal), sink)
    probs = _shares(jnp.where(mask, scores, _LOWEST), sink)
    # Only rows that see nothing still hold weight on masked keys: softmax made them uniform.
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), probs, 0.0)


def _shares(scores: jax.Array, sink: jax.Array | None) -> jax.Array:
    """exp(scores) over their sum and that of the sink."""
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = beside(sink.astype(jnp.float32), scores)
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
    highest = jax.lax.stop_gradient(highest)
    exps = jnp.exp(scores - highest)
    return exps / (jnp.sum(exps, axis=-1, keepdims=True) + jnp.exp(sink - highest))


def _lowered(scores: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    """Scores plus the lowest float where a key is masked, which swallows any score.

    A row that is masked whole becomes uniform so, and its gradient still reaches the scores. The
    original's decoder adds that number once for padding and once for later tokens, and bounds the
    sum by it from below: the bound halves the gradient where it is met, and stops it where both
    numbers were added.
    """
    if not causal:
        return scores + jnp.where(mask, 0.0, _LOWEST)
    queries, keys = scores.shape[-2:]
    later = beside(~jnp.tril(jnp.ones((queries, keys), bool), keys - queries), scores)
    # What no query sees: a token sees itself.
    padding = ~jnp.any(mask, axis=-2, keepdims=True)
    once_or_twice = jnp.where(later & padding, -jnp.inf, _LOWEST)
    return jnp.maximum(scores + jnp.where(mask, 0.0, once_or_twice), _LOWEST)


def clipped_softmax(
    scores: jax.Array,
    mask: jax.Array | None = None,
    *,
    gamma: float = 0.0,
    zeta: float = 1.0,
    alpha: float = 0.0,
    blind_queries: str = "zero",
    causal: bool = False,
    sink: jax.Array | None = None,
) -> jax.Array:
    """`clip((zeta - gamma) * softmax(scores) + gamma, 0, 1)`, paper eq. 4.

    Clipped entries are exactly 0 or 1 and pass no gradient, so a head can do nothing without
    pushing its scores ever further apart.

    Args:
      scores: [..., queries, keys].
      mask: as in `softmax`; masked keys stay exactly 0.
      gamma: lower stretch, <= 0.
      zeta: upper stretch, >= 1.
      alpha: above 0, each row has its own lower stretch in place of `gamma`: -alpha over the keys
        that its query sees (see `row_gammas`).
      blind_queries, causal: as in `softmax`; a uniform row of S keys is stretched and clipped as
        every other: `max((zeta - gamma) / S + gamma, 0)`.
      sink: as in `softmax`.

    Returns:
      float32 [..., queries, keys], in [0, 1]; rows need not sum to 1.

    Raises:
      UserError: gamma > 0, zeta < 1, or alpha < 0 or beside a gamma.
    """
    check_stretch(gamma, zeta, alpha)
    probs = softmax(scores, mask, blind_queries=blind_queries, causal=causal, sink=sink)
    if (gamma, zeta, alpha) == (0.0, 1.0, 0.0):
        return probs
    low: float | jax.Array = gamma
    if alpha:
        low = row_gammas(alpha, mask, scores.shape[-1], blind_queries)
        low = beside(low, probs) if isinstance(low, jax.Array) else low
    stretched = probs * (zeta - low) + low
    # Not jnp.clip: at a bound its gradient is halved, the definition passes it whole.
    stretched = jnp.where(stretched < 0.0, 0.0, stretched)
    return jnp.where(stretched > 1.0, 1.0, stretched)


def row_gammas(
    alpha: float, mask: jax.Array | None, keys: int, blind_queries: str = "zero"
) -> float | jax.Array:
    """`-alpha / t` with t the keys that a row's query sees, float32 [..., queries or 1, 1].

    Length-normalised clipping (NCS, arXiv 2402.12102): a causal row t, or one beside padding, is
    clipped at the same share of the uniform probability 1 / t as every other. A float for all rows
    where there is no mask. A sink is no key. A query that sees none has the gamma of one key, or of
    all where it is uniform over them.

    Args:
      alpha: above 0.
      mask: as in `softmax`.
      keys: length of a row.
      blind_queries: as in `softmax`.
    """
    if mask is None:
        return -alpha / keys
    seen = jnp.broadcast_to(mask.astype(bool), (*mask.shape[:-1], keys))
    count = jnp.sum(seen, axis=-1, keepdims=True, dtype=jnp.float32)
    return -alpha / jnp.where(count == 0.0, keys if blind_queries == "uniform" else 1.0, count)


def check_stretch(gamma: float, zeta: float, alpha: float = 0.0) -> None:
    """Raises UserError unless gamma <= 0, zeta >= 1 and alpha >= 0, which leaves gamma at 0."""
    if alpha < 0.0 or (alpha and gamma):
        raise UserError(
            f"length-normalised clipping needs alpha >= 0 in place of gamma, found alpha={alpha}, "
            f"gamma={gamma}."
        )
    if gamma > 0.0 or zeta < 1.0:
        raise UserError(
            f"clipped softmax needs gamma <= 0 and zeta >= 1, found gamma={gamma}, zeta={zeta}."
        )
