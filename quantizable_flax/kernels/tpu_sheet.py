"""Mathematics of one sheet of scores on a TPU, keys down and queries across: [keys, queries].

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

# By name: libraries that intercept `jax.lax.dot_general` by patching it are not to reach in here.
from jax.lax import dot_general

from quantizable_flax.kernels.random_bits import kept, row_words
from quantizable_flax.kernels.scheme import HIDDEN, Scheme
from quantizable_flax.kernels.tpu_plan import LANES, Plan
from quantizable_flax.quantization.tensor import precision_of

LOWEST = float(jnp.finfo(jnp.float32).min)
NT, NN = (1, 1), (1, 0)  # which axes of two matrices a product sums over


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

    def scores(self, rows: jax.Array, keys: jax.Array, seen: jax.Array | None) -> jax.Array:
        """float32, the lowest number where a key is hidden; rows are those of `of_head`."""
        scores = dot(keys, rows, NT) * scales(self.scheme, keys)[1]
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

    def gradients(
        self,
        head: int,
        probs: jax.Array,
        d_weights: jax.Array,
        weighted: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights of values, the gradient of the scores, and D [1, queries] where it is not given.

        What multiplies all of them alike is left out: `survivors(scheme)` of the weights, `slope`
        of D and of the gradient, and the scale of the scores.
        """
        keep = self.keep(head)
        weights, passes = probs, keep
        if self.scheme.clips:
            stretched = self.scheme.stretched(probs)
            weights, inside = clipped(self.scheme, stretched), through_clip(self.scheme, stretched)
            passes = both(inside, keep)
        d_probs = where(passes, d_weights)
        if weighted is None:
            weighted = jnp.sum(probs * d_probs, axis=0, keepdims=True)
        return where(keep, weights), probs * (d_probs - weighted), weighted


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


def scales(scheme: Scheme, keys: jax.Array) -> tuple[float, float]:
    """The scale of the scores, as one of the queries and one of their products with keys."""
    exact = keys.dtype == jnp.float32 or math.frexp(abs(scheme.scale))[0] in (0.0, 0.5)
    return (scheme.scale, 1.0) if exact else (1.0, scheme.scale)


def both(one: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """And, None for all."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def where(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, zero outside the mask."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The float32 product of two matrices, summed over an axis of each."""
    return dot_general(
        *(x, y, (((axes[0],), (axes[1],)), ((), ()))),
        precision=precision_of(x, y),
        preferred_element_type=jnp.float32,
    )


def transposed(x: jax.Array) -> jax.Array:
    """Of a matrix, by way of float32, which every TPU can transpose."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def there(x: jax.Array, count: Any, whole: bool) -> jax.Array:
    """[rows, lanes], zero from row `count` on; as it is if `whole`.

    Beyond the end of an array is anything, infinities too.
    """
    if whole:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < count, x.astype(jnp.float32), 0.0).astype(x.dtype)


def of_head(plan: Plan, x: jax.Array, head: int, scale: float = 1.0) -> jax.Array:
    """[rows, lanes] times `scale`, zero outside the tile's `head`.

    A product with it is that head's alone, and takes as long as one with fewer lanes would.
    """
    if plan.tile_heads == 1 and scale == 1.0:
        return x
    scaled = x.astype(jnp.float32) * scale
    if plan.tile_heads > 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        start = head * plan.head_width
        scaled = jnp.where((lane >= start) & (lane < start + plan.head_width), scaled, 0.0)
    return scaled.astype(x.dtype)


def rows_of_head(plan: Plan, x: jax.Array, head: int) -> jax.Array:
    """Rows of [lanes, n] that are those of a tile's head."""
    return x[head * plan.head_width : (head + 1) * plan.head_width]
