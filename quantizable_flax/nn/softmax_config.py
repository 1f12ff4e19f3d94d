"""Which softmax an attention takes, as plain data, and the way to it from a configuration."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.nn.softmax import BLIND_QUERIES, check_stretch, clipped_softmax

KINDS = ("vanilla", "clipped")
SINKS = ("none", "zero", "learned")

SoftmaxFn = Callable[[jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig:
    """Which softmax, as plain data: equal configs compare equal, and a call maps scores to probs.

    Attributes:
      kind: "vanilla" or "clipped".
      gamma, zeta: stretch of the clipped one, as in `clipped_softmax`.
      blind_queries, causal: as in `softmax`.
      sink: "none"; "zero", one more logit of 0 ("softmax1"); or "learned", one for each head.
      alpha: of length-normalised clipping, as in `clipped_softmax`; 0 for one gamma.
    """

    kind: str = "vanilla"
    gamma: float = 0.0
    zeta: float = 1.0
    blind_queries: str = "zero"
    causal: bool = False
    sink: str = "none"
    alpha: float = 0.0

    def __post_init__(self):
        """Raises UserError for a field outside its domain."""
        check_choice("attention softmax", self.kind, KINDS)
        check_choice("attention blind_queries", self.blind_queries, BLIND_QUERIES)
        check_choice("attention sink", self.sink, SINKS)
        check_stretch(self.gamma, self.zeta, self.alpha)
        if self.kind == "vanilla" and (self.gamma, self.zeta, self.alpha) != (0.0, 1.0, 0.0):
            raise UserError(
                f"a stretch belongs to softmax='clipped', found gamma={self.gamma}, "
                f"zeta={self.zeta}, alpha={self.alpha} and softmax='vanilla': set the softmax to "
                "'clipped' or leave them unset."
            )

    def __call__(
        self,
        scores: jax.Array,
        mask: jax.Array | None = None,
        sink_H: jax.Array | None = None,
    ) -> jax.Array:
        """[..., H, queries, keys] -> float32 probabilities, as `softmax` or `clipped_softmax`.

        Raises:
          UserError: the sink is learned, and its logits are not given.
        """
        sink_H = self.sink_logits(sink_H, scores.shape[-3] if scores.ndim > 2 else 1)
        # Without a stretch, clipped softmax is the vanilla one.
        return clipped_softmax(
            scores,
            mask,
            gamma=self.gamma,
            zeta=self.zeta,
            alpha=self.alpha,
            blind_queries=self.blind_queries,
            causal=self.causal,
            sink=None if sink_H is None else sink_H[:, None, None],
        )

    def sink_logits(self, learned_H: jax.Array | None, heads: int) -> jax.Array | None:
        """The sink's logits, float32 [H]; None where there is none.

        Raises:
          UserError: the sink is learned and `learned_H` is None, or the other way round.
        """
        if learned_H is not None and self.sink != "learned":
            raise UserError(
                f"logits of sinks belong to sink='learned', found sink='{self.sink}': make the "
                "softmax with it or leave them out."
            )
        if self.sink == "none":
            return None
        if self.sink == "zero":
            return jnp.zeros((heads,), jnp.float32)
        if learned_H is None:
            raise UserError(
                "a softmax with sink='learned' needs the logits of its sinks, [heads], found none: "
                "give them, or take sink='zero'."
            )
        return learned_H


VANILLA = SoftmaxConfig()


def make_softmax(
    kind: str = "vanilla",
    *,
    gamma: float | None = None,
    zeta: float | None = None,
    alpha: float | None = None,
    length_normalised: bool = False,
    seq_len: int | None = None,
    blind_queries: str = "zero",
    sink: str = "none",
    causal: bool = False,
) -> SoftmaxConfig:
    """Returns the softmax that a configuration asks for, with gamma from alpha and T.

    Args:
      kind: "vanilla" or "clipped".
      gamma: lower stretch, <= 0; 0 when neither it nor `alpha` is given.
      zeta: upper stretch, >= 1; 1 by default.
      alpha: gives `gamma = -alpha / seq_len` (paper section 4.1), exclusive with `gamma`.
      length_normalised: alpha over the keys that each query sees instead, gamma row by row (NCS,
        arXiv 2402.12102); for causal models and padding.
      seq_len: the training sequence length T, in tokens; needed with `alpha`, unless it is
        length-normalised.
      blind_queries: what a query gets that sees no key: "zero", or "uniform" over all keys.
      sink: "none"; "zero", one more logit of 0 in the softmax, which no key has ("softmax1"); or
        "learned", one for each head (an attention sink).
      causal: as in `softmax`; of a decoder.

    Raises:
      UserError: unknown kind or blind_queries, both of gamma and alpha, alpha without seq_len, or
        a stretch out of its bounds.
    """
    check_choice("attention softmax", kind, KINDS)
    # Elsewhere it means nothing, and two configs that do the same are to be equal.
    causal = causal and blind_queries == "uniform"
    if kind == "clipped":
        if length_normalised:
            stretch = _of_rows(gamma, zeta, alpha)
        else:
            stretch = *_stretch(gamma, zeta, alpha, seq_len), 0.0
        gamma, zeta, alpha = stretch
        return SoftmaxConfig(kind, gamma, zeta, blind_queries, causal, sink, alpha)
    if length_normalised or any(value is not None for value in (gamma, zeta, alpha)):
        raise UserError(
            "gamma, zeta, alpha and length_normalised belong to softmax='clipped', found "
            "softmax='vanilla': set the softmax to 'clipped' or leave them unset."
        )
    return SoftmaxConfig(blind_queries=blind_queries, causal=causal, sink=sink)


def _of_rows(
    gamma: float | None, zeta: float | None, alpha: float | None
) -> tuple[float, float, float]:
    """Returns the (gamma, zeta, alpha) of a softmax whose rows have gammas of their own."""
    if alpha is None or gamma is not None or alpha <= 0:
        raise UserError(
            "length_normalised clipping needs alpha > 0, by which each query's gamma is -alpha "
            f"over the keys that it sees, found alpha={alpha}, gamma={gamma}: set alpha alone."
        )
    return 0.0, 1.0 if zeta is None else zeta, alpha


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
