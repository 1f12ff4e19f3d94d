"""What a fused attention computes: `Scheme`, static, and `Extras`, the arrays beside q, k and v.

With scores `S = scale q k^T` where a query sees a key, and an optional sink logit z by head,

    P = exp(S - L),  L = log(exp(z) + sum_j exp(S_j))
    C = clip((zeta - gamma) P + gamma, 0, 1)           arXiv 2306.12929, eq. 4
    O = (C * M / (1 - dropout_rate)) V                 M: which entries dropout keeps

Hidden keys have P = C = 0, and a query that sees no key has O = 0. With `alpha` gamma is
`-alpha / t` in a row whose query sees t keys (NCS, arXiv 2402.12102), a constant there. Backwards,
with
`W = M / (1 - dropout_rate)` and I = 1 where the stretched probability lies in [0, 1] and the key is
seen,

    dC = W * (dO V^T),  dP = (zeta - gamma) I * dC,  D = sum_j P_j dP_j
    dS = P * (dP - D),  dV = (C * W)^T dO,  dz = -sum exp(z - L) D

D is not flash attention's `sum(dO * O)`, for clipped entries weigh in O but pass no gradient; it is
`sum(dO * U)` with `U = (zeta - gamma) (I * W * P) V`. gamma = 0 and zeta = 1 is the ordinary
softmax (U = O), z = 0 the softmax with one added to its denominator ("softmax1"), and a learned z
an attention sink.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1  # the id of a key that no query sees


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The static side of an attention; see the module for the formulas.

    Attributes:
      scale: of the scores.
      gamma, zeta: the stretch of clipped softmax; 0 and 1 for none.
      alpha: above 0, of rows that have a gamma of their own in place of that; blockwise alone.
      causal: whether query i sees the keys up to i (plus the first query's place) alone.
      dropout_rate: of the probabilities, in [0, 1).
    """

    scale: float = 1.0
    gamma: float = 0.0
    zeta: float = 1.0
    causal: bool = False
    dropout_rate: float = 0.0
    alpha: float = 0.0

    @property
    def clips(self) -> bool:
        """Whether there is a stretch."""
        return (self.gamma, self.zeta, self.alpha) != (0.0, 1.0, 0.0)

    def gammas(self, seen: jax.Array | None, keys: int) -> float | jax.Array:
        """gamma, of all rows or of each, [..., queries, 1].

        Args:
          seen: which keys are seen, [..., queries, keys], None for all.
          keys: how many there are.
        """
        if not self.alpha:
            return self.gamma
        if seen is None:
            return -self.alpha / keys
        count = jnp.sum(seen, axis=-1, keepdims=True, dtype=jnp.float32)
        return -self.alpha / jnp.maximum(count, 1.0)

    def stretched(self, probs: jax.Array, gammas: float | jax.Array | None = None) -> jax.Array:
        """P -> (zeta - gamma) P + gamma, not yet clipped."""
        low = self.gamma if gammas is None else gammas
        return probs * (self.zeta - low) + low


class Extras(NamedTuple):
    """Arrays of a call beside q [B, T, H, K], k and v [B, S, H, K]; None where there is none.

    Attributes:
      query_ids, key_ids: int32 [B, T] and [B, S], given both or neither: a query sees the keys of
        its own id alone, none of id `HIDDEN`. Padding: keys of id 0 and HIDDEN, queries of 0.
      sink: float32 [H], a logit that takes part in the softmax and has no value.
      seed: uint32 [2], where dropout begins to count.
      first: int32 [3], the places in the whole of this part's first batch row, head and query, for
        a part of a mesh; None is (0, 0, 0).
    """

    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    sink: jax.Array | None = None
    seed: jax.Array | None = None
    first: jax.Array | None = None


NO_EXTRAS = Extras()


def visible(
    scheme: Scheme, extras: Extras, queries: jax.Array, keys: jax.Array
) -> jax.Array | None:
    """Which keys are seen, [B or 1, 1, queries, keys]; None where all are.

    Args:
      scheme, extras: of the call.
      queries, keys: int32 indices [t] and [s], those to look at.
    """
    seen = None
    if scheme.causal:
        first = 0 if extras.first is None else extras.first[2]
        seen = (keys[None, :] <= queries[:, None] + first)[None, None]
    if extras.key_ids is not None and extras.query_ids is not None:
        query_ids, key_ids = extras.query_ids[:, queries], extras.key_ids[:, keys]
        same = (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids != HIDDEN)[:, None, :]
        seen = same[:, None] if seen is None else seen & same[:, None]
    return seen
