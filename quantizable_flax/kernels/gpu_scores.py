"""From a block of scores to weights, inside the Hopper kernels; `blockwise` has the same whole.

Blocks are [rows, columns], queries by keys or, in the kernel of dK and dV, keys by queries. Scores
are not yet scaled; those that are hidden are `LOWEST`, finite so that no infinities meet. L is in
units of log 2.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from quantizable_flax.kernels.gpu_parts import TILE, WGMMA, Plan, Rows
from quantizable_flax.kernels.random_bits import kept
from quantizable_flax.kernels.scheme import Scheme

LOWEST = -1e30
LOG2E = math.log2(math.e)


class Place(NamedTuple):
    """Where a block of scores lies.

    Attributes:
      query, key: the first of each.
      key_axis: 1 where rows are queries, 0 where they are keys.
      offset: what to add to a query's index before it is compared with a key's.
    """

    query: jax.Array
    key: jax.Array
    key_axis: int
    offset: jax.Array

    @property
    def query_axis(self) -> int:
        """Along which the queries lie."""
        return 1 - self.key_axis

    def by_query(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A vector of queries -> [rows, columns]."""
        return jax.lax.broadcast_in_dim(x, shape, [self.query_axis])

    def by_key(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A vector of keys -> [rows, columns]."""
        return jax.lax.broadcast_in_dim(x, shape, [self.key_axis])

    def keys(self, shape: tuple[int, ...]) -> jax.Array:
        """Indices of the keys, from 0 at the block's first one."""
        return plgpu.broadcasted_iota(jnp.int32, shape, self.key_axis, layout=WGMMA)

    def queries(self, shape: tuple[int, ...]) -> jax.Array:
        """Indices of the queries, from 0 at the block's first one."""
        return plgpu.broadcasted_iota(jnp.int32, shape, self.query_axis, layout=WGMMA)


def key_blocks(plan: Plan, rows: Rows, tile: jax.Array, size: int) -> jax.Array:
    """How many blocks of `size` keys the queries of a tile look at, one at least."""
    blocks = jnp.int32(pl.cdiv(plan.keys, size))
    if not plan.scheme.causal:
        return blocks
    seen = (tile + 1) * TILE + rows.query_offset()
    return jnp.clip(jax.lax.div(seen + (size - 1), jnp.int32(size)), 1, blocks)


def first_query_block(plan: Plan, rows: Rows, tile: jax.Array, size: int) -> jax.Array:
    """The first block of `size` queries that sees a key of a tile."""
    if not plan.scheme.causal:
        return jnp.int32(0)
    before = jax.lax.div(jnp.maximum(tile * TILE - rows.query_offset(), 0), jnp.int32(size))
    return jnp.minimum(before, pl.cdiv(plan.queries, size))


def hide(
    plan: Plan, scores: jax.Array, place: Place, ids: tuple[jax.Array | None, jax.Array | None]
) -> jax.Array:
    """Puts `LOWEST` where a query does not see a key; `ids` are the queries' and the keys'."""
    shape = scores.shape
    query_ids, key_ids = ids
    if query_ids is not None and key_ids is not None:
        same = place.by_query(query_ids, shape) == place.by_key(key_ids, shape)
        scores = jnp.where(same, scores, LOWEST)
    if plan.scheme.causal:
        distance = place.query + place.offset - place.key  # from the first key to the last seen

        def below() -> jax.Array:
            ahead = place.keys(shape) - place.queries(shape)
            return jnp.where(ahead <= distance, scores, LOWEST)

        scores = jax.lax.cond(shape[place.key_axis] - 1 > distance, below, lambda: scores)
    # Ids hide what is padded; and rows of keys beyond the end are never written.
    if key_ids is None and place.key_axis == 1 and plan.keys % shape[1]:

        def within() -> jax.Array:
            return jnp.where(place.keys(shape) < plan.keys - place.key, scores, LOWEST)

        scores = jax.lax.cond(place.key + shape[1] > plan.keys, within, lambda: scores)
    return scores


def exponentials(scheme: Scheme, scores: jax.Array, minus: jax.Array, place: Place) -> jax.Array:
    """`exp(scale S)` divided by 2 to the `minus` of the query."""
    return jnp.exp2(scores * (scheme.scale * LOG2E) - place.by_query(minus, scores.shape))


def clip(scheme: Scheme, probs: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The clipped probabilities, and what puts 0 where one was clipped."""
    if not scheme.clips:
        return probs, lambda x: x
    stretched = scheme.stretched(probs)
    clipped = jnp.minimum(jnp.maximum(stretched, 0.0), 1.0)
    inside = clipped == stretched
    return clipped, lambda x: jnp.where(inside, x, 0.0)


def dropout(
    plan: Plan, words: Any, place: Place, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Returns what puts 0 where dropout drops an entry; it scales nothing."""
    if not words:
        return lambda x: x
    one, other = (place.by_query(word, shape) for word in words)
    keep = kept((one, other), place.keys(shape) + place.key, plan.scheme.dropout_rate)
    return lambda x: jnp.where(keep, x, 0.0)
