"""One sheet of scores in a TPU kernel, keys down and queries across: [keys, queries].

So the sums of a row of attention run down a sheet, which is cheap, their results are dense rows
of lanes, and every product with a sheet is free of transposing it: what is transposed are the
narrow operands beside it.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from quantizable_flax.kernels.random_bits import kept, row_words
from quantizable_flax.kernels.scheme import HIDDEN, Scheme
from quantizable_flax.kernels.tpu_plan import LANES, Plan
from quantizable_flax.kernels.tpu_tile import NT, dot, of_head, there

LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Where a sheet lies.

    Attributes:
      scheme, plan: of the call.
      scalars: ref of `tpu_plan.scalars`.
      batch, head, query, key: its first places; of the heads that of the grid step.
      size: keys and queries of it.
      query_ids, key_ids: refs of [1, 1, queries] and [1, 1, keys at least], or None.
    """

    scheme: Scheme
    plan: Plan
    scalars: Any
    batch: Any
    head: Any
    query: Any
    key: Any
    size: tuple[int, int]
    query_ids: Any
    key_ids: Any

    def seen(self) -> jax.Array | None:
        """Which keys are seen, by index and id; None where all are."""
        checks = []
        down, across = (jax.lax.broadcasted_iota(jnp.int32, self.size, axis) for axis in (0, 1))
        if self.scheme.causal:
            ahead = self.query - self.key + (0 if self.plan.skips else self.scalars[4])
            checks.append(down - across <= ahead)
        # Queries that are there see no key beyond them.
        covered = self.plan.skips and self.plan.queries <= self.plan.keys
        if self.plan.keys % self.plan.block_k and not covered:
            checks.append(down < self.plan.keys - self.key)
        if self.key_ids is not None:
            keys, queries = self.size
            ids = jnp.broadcast_to(self.key_ids[0, :, :keys], (LANES, keys)).T
            ids = jnp.concatenate([ids] * (queries // LANES), axis=1)
            checks.append((ids == self.query_ids[0]) & (ids != HIDDEN))
        return functools.reduce(operator.and_, checks) if checks else None

    def scores(
        self, head: int, rows: jax.Array, keys: jax.Array, seen: jax.Array | None
    ) -> jax.Array:
        """float32, the lowest number where a key is hidden; of the step's `head`."""
        return self.scores_of(self.own_rows(head, rows), keys, seen)

    def own_rows(self, head: int, rows: jax.Array) -> jax.Array:
        """Queries of the step's `head` alone, times as much of the scale as is exact."""
        scale = query_scale(self.scheme, rows.dtype)
        return of_head(self.plan, rows, head % self.plan.tile_heads, scale)

    def scores_of(self, own: jax.Array, keys: jax.Array, seen: jax.Array | None) -> jax.Array:
        """`scores`, from the result of `own_rows`."""
        scores = dot(keys, own, NT)
        scale = self.scheme.scale / query_scale(self.scheme, keys.dtype)
        scores = scores if scale == 1.0 else scores * scale
        return scores if seen is None else jnp.where(seen, scores, LOWEST)

    def keep(self, head: int) -> jax.Array | None:
        """Which entries dropout keeps, of the step's `head`; None for all."""
        if not self.scheme.dropout_rate:
            return None
        seed = [self.scalars[i].astype(jnp.uint32) for i in range(2)]
        queries = jax.lax.broadcasted_iota(jnp.int32, (1, self.size[1]), 1)
        words = row_words(
            seed,
            self.batch + self.scalars[2],
            self.head + head + self.scalars[3],
            queries + (self.query + self.scalars[4]),
        )
        keys = jax.lax.broadcasted_iota(jnp.int32, self.size, 0) + self.key
        return kept(words, keys, self.scheme.dropout_rate)

    def queries_there(self, x: jax.Array) -> jax.Array:
        """[queries, lanes], zero beyond the last query."""
        ragged = self.plan.queries % self.plan.block_q
        return there(x, self.plan.queries - self.query) if ragged else x

    def keys_there(self, x: jax.Array) -> jax.Array:
        """[keys, lanes], zero beyond the last key."""
        ragged = self.plan.keys % self.plan.block_k
        return there(x, self.plan.keys - self.key) if ragged else x

    def row_there(self, x: jax.Array, beyond: float) -> jax.Array:
        """[1, queries], `beyond` the last query."""
        if not self.plan.queries % self.plan.block_q:
            return x
        query = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(query < self.plan.queries - self.query, x, beyond)


def clipped(scheme: Scheme, stretched: jax.Array) -> jax.Array:
    """Clip to [0, 1], where the stretch leaves it."""
    if scheme.gamma < 0.0:
        stretched = jnp.maximum(stretched, 0.0)
    return jnp.minimum(stretched, 1.0) if scheme.zeta > 1.0 else stretched


def through_clip(scheme: Scheme, stretched: jax.Array) -> jax.Array | None:
    """Where the clip passes a gradient; None for everywhere."""
    lower = stretched >= 0.0 if scheme.gamma < 0.0 else None
    return both(lower, stretched <= 1.0 if scheme.zeta > 1.0 else None)


def survivors(scheme: Scheme) -> float:
    """What dropout multiplies the kept with."""
    return 1.0 / (1.0 - scheme.dropout_rate)


def slope(scheme: Scheme) -> float:
    """The derivative of a weight by its probability where it is neither clipped nor dropped."""
    return (scheme.zeta - scheme.gamma) * survivors(scheme)


def query_scale(scheme: Scheme, dtype: Any) -> float:
    """What of the scores' scale queries of this type are multiplied with; exact in bfloat16."""
    exact = dtype == jnp.float32 or abs(math.frexp(scheme.scale)[0]) == 0.5
    return scheme.scale if exact else 1.0


def both(one: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """And, None for all."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def where(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, zero outside the mask."""
    return x if mask is None else jnp.where(mask, x, 0.0)
