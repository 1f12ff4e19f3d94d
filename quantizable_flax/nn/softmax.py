"""Softmax and clipped softmax as pure functions of attention scores (arXiv 2306.12929, eq. 4)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.quantization.tensor import beside

KINDS = ("vanilla", "clipped")
BLIND_QUERIES = ("zero", "uniform")

SoftmaxFn = Callable[[jax.Array, jax.Array | None], jax.Array]

_LOWEST = float(jnp.finfo(jnp.float32).min)


def softmax(
    scores: jax.Array,
    mask: jax.Array | None = None,
    *,
    blind_queries: str = "zero",
    causal: bool = False,
) -> jax.Array:
    """Softmax over the last axis, in float32.

    Args:
      scores: [..., queries, keys], any floating dtype.
      mask: broadcastable to `scores`, True where a key is visible; None shows every key.
      blind_queries: what a query gets that sees no key: "zero", or "uniform" over all keys, masked
        ones included, as in the original implementation.
      causal: with "uniform", whether `mask` is a decoder's; see `_lowered`.

    Returns:
      float32 probabilities; a masked key has exactly 0, but for blind queries that are uniform.
    """
    check_choice("attention blind_queries", blind_queries, BLIND_QUERIES)
    scores = scores.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    mask = beside(mask.astype(bool), scores)
    if blind_queries == "uniform":
        return jax.nn.softmax(_lowered(scores, mask, causal), axis=-1)
    probs = jax.nn.softmax(jnp.where(mask, scores, _LOWEST), axis=-1)
    # Only rows that see nothing still hold weight on masked keys: softmax made them uniform.
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), probs, 0.0)


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
    blind_queries: str = "zero",
    causal: bool = False,
) -> jax.Array:
    """`clip((zeta - gamma) * softmax(scores) + gamma, 0, 1)`, paper eq. 4.

    Clipped entries are exactly 0 or 1 and pass no gradient, so a head can do nothing without
    pushing its scores ever further apart.

    Args:
      scores: [..., queries, keys].
      mask: as in `softmax`; masked keys stay exactly 0.
      gamma: lower stretch, <= 0.
      zeta: upper stretch, >= 1.
      blind_queries, causal: as in `softmax`; a uniform row of S keys is stretched and clipped as
        every other: `max((zeta - gamma) / S + gamma, 0)`.

    Returns:
      float32 [..., queries, keys], in [0, 1]; rows need not sum to 1.

    Raises:
      UserError: gamma > 0 or zeta < 1.
    """
    check_stretch(gamma, zeta)
    probs = softmax(scores, mask, blind_queries=blind_queries, causal=causal)
    if gamma == 0.0 and zeta == 1.0:
        return probs
    stretched = probs * (zeta - gamma) + gamma
    # Not jnp.clip: at a bound its gradient is halved, the definition passes it whole.
    stretched = jnp.where(stretched < 0.0, 0.0, stretched)
    return jnp.where(stretched > 1.0, 1.0, stretched)


def check_stretch(gamma: float, zeta: float) -> None:
    """Raises UserError unless gamma <= 0 and zeta >= 1."""
    if gamma > 0.0 or zeta < 1.0:
        raise UserError(
            f"clipped softmax needs gamma <= 0 and zeta >= 1, found gamma={gamma}, zeta={zeta}."
        )


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig:
    """Which softmax, as plain data: equal configs compare equal, and a call maps scores to probs.

    Attributes:
      kind: "vanilla" or "clipped".
      gamma, zeta: stretch of the clipped one, as in `clipped_softmax`.
      blind_queries, causal: as in `softmax`.
    """

    kind: str = "vanilla"
    gamma: float = 0.0
    zeta: float = 1.0
    blind_queries: str = "zero"
    causal: bool = False

    def __post_init__(self):
        """Raises UserError for a field outside its domain."""
        check_choice("attention softmax", self.kind, KINDS)
        check_choice("attention blind_queries", self.blind_queries, BLIND_QUERIES)
        check_stretch(self.gamma, self.zeta)
        if self.kind == "vanilla" and (self.gamma, self.zeta) != (0.0, 1.0):
            raise UserError(
                f"a stretch belongs to softmax='clipped', found gamma={self.gamma}, "
                f"zeta={self.zeta} and softmax='vanilla': set the softmax to 'clipped' or leave "
                "them unset."
            )

    def __call__(self, scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[..., queries, keys] -> float32 probabilities, as `softmax` or `clipped_softmax`."""
        # Without a stretch, clipped softmax is the vanilla one.
        return clipped_softmax(
            scores,
            mask,
            gamma=self.gamma,
            zeta=self.zeta,
            blind_queries=self.blind_queries,
            causal=self.causal,
        )


VANILLA = SoftmaxConfig()


def make_softmax(
    kind: str = "vanilla",
    *,
    gamma: float | None = None,
    zeta: float | None = None,
    alpha: float | None = None,
    seq_len: int | None = None,
    blind_queries: str = "zero",
    causal: bool = False,
) -> SoftmaxConfig:
    """Returns the softmax that a configuration asks for, with gamma from alpha and T.

    Args:
      kind: "vanilla" or "clipped".
      gamma: lower stretch, <= 0; 0 when neither it nor `alpha` is given.
      zeta: upper stretch, >= 1; 1 by default.
      alpha: gives `gamma = -alpha / seq_len` (paper section 4.1), exclusive with `gamma`.
      seq_len: the training sequence length T, in tokens; needed with `alpha` alone.
      blind_queries: what a query gets that sees no key: "zero", or "uniform" over all keys.
      causal: as in `softmax`; of a decoder.

    Raises:
      UserError: unknown kind or blind_queries, both of gamma and alpha, alpha without seq_len, or
        a stretch out of its bounds.
    """
    check_choice("attention softmax", kind, KINDS)
    # Elsewhere it means nothing, and two configs that do the same are to be equal.
    causal = causal and blind_queries == "uniform"
    if kind == "clipped":
        gamma, zeta = _stretch(gamma, zeta, alpha, seq_len)
        return SoftmaxConfig(kind, gamma, zeta, blind_queries, causal)
    if any(value is not None for value in (gamma, zeta, alpha)):
        raise UserError(
            "gamma, zeta and alpha belong to softmax='clipped', found softmax='vanilla': "
            "set the softmax to 'clipped' or leave them unset."
        )
    return SoftmaxConfig(blind_queries=blind_queries, causal=causal)


def _stretch(
    gamma: float | None, zeta: float | None, alpha: float | None, seq_len: int | None
) -> tuple[float, float]:
    """Returns the (gamma, zeta) that `make_softmax` is asked for."""
    if gamma is None and alpha is None and zeta is None:
        raise UserError(
            "clipped softmax needs gamma, alpha or zeta, found none of them: the paper uses gamma "
            "-0.025 for BERT at 128 tokens."
        )
    if gamma is not None and alpha is not None:
        raise UserError(
            f"clipped softmax takes gamma or alpha, found gamma={gamma} and alpha={alpha}: "
            "leave one of them unset."
        )
    if alpha is not None:
        if not seq_len or alpha < 0:
            raise UserError(
                "clipped softmax with alpha needs alpha >= 0 and the training sequence length, "
                f"found alpha={alpha}, sequence length {seq_len}."
            )
        gamma = -alpha / seq_len
    return gamma or 0.0, 1.0 if zeta is None else zeta
