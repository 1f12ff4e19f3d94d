"""Fused attention in plain XLA: a loop over blocks of queries, each with its whole rows of scores.

One sweep is enough for a whole row, forwards and backwards. What exists at a time is
[B, H, block, S], so memory grows with the sequence's length and not with its square.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from quantizable_flax.kernels.random_bits import kept, row_words
from quantizable_flax.kernels.scheme import Extras, Scheme, visible
from quantizable_flax.quantization.tensor import precision_of

BLOCK = 128  # queries at a time
CAUSAL_GROUPS = 8  # runs of blocks that share how many keys they look at

_LOWEST = float(jnp.finfo(jnp.float32).min)
Block = tuple[jax.Array, Any]  # the queries' indices, and their slices of arrays
Gammas = float | jax.Array


def forward(
    scheme: Scheme, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, training: bool
) -> tuple[jax.Array, Any]:
    """Returns [B, T, H, K] in v's dtype, and what `backward` needs (None unless training)."""
    keys, vals = _heads_first(k), _heads_first(v)

    def block(keys, vals, part):
        indices, rows = part
        scores, gammas = _scores(scheme, extras, indices, rows, keys)
        probs, logsumexp = _probs(extras, scores)
        weights = _times_dropout(scheme, extras, indices, _clipped(scheme, probs, gammas))
        context = _product("BHTS,BHSK->BHTK", weights.astype(v.dtype), vals).astype(v.dtype)
        return context, logsumexp if training else None

    parts = [
        jax.lax.map(functools.partial(block, keys[:, :, :seen], vals[:, :, :seen]), rows)
        for seen, rows in _groups(scheme, extras, k.shape[1], _heads_first(q))
    ]
    out, logsumexp = jax.tree.map(lambda *groups: _joined(groups, q.shape[1]), *parts)
    return _heads_first(out), logsumexp


def backward(
    scheme: Scheme,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    saved: Any,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns the gradients of q, k, v, in their dtypes, and of the sink, float32 or None."""
    keys, vals = _heads_first(k), _heads_first(v)

    def block(seen, sums, part):
        indices, (rows, d_rows, logsumexp) = part
        keys_seen, vals_seen = keys[:, :, :seen], vals[:, :, :seen]
        scores, gammas = _scores(scheme, extras, indices, rows, keys_seen)
        probs = jnp.exp(scores - logsumexp[..., None])
        weights = _times_dropout(scheme, extras, indices, _clipped(scheme, probs, gammas))
        d_vals = _product("BHTS,BHTK->BHSK", weights.astype(d_rows.dtype), d_rows)
        d_clipped = _product("BHTK,BHSK->BHTS", d_rows, vals_seen)
        d_clipped = _times_dropout(scheme, extras, indices, d_clipped)
        d_probs = _through_clip(scheme, probs, gammas, d_clipped)
        weighted_BxHxTx1 = jnp.sum(probs * d_probs, axis=-1, keepdims=True)
        d_scores = (scheme.scale * probs * (d_probs - weighted_BxHxTx1)).astype(k.dtype)
        d_rows = _product("BHTS,BHSK->BHTK", d_scores, keys_seen)
        d_keys = _product("BHTS,BHTK->BHSK", d_scores, rows)
        sums = tuple(_added(*pair) for pair in zip(sums, (d_keys, d_vals), strict=True))
        return sums, (d_rows.astype(q.dtype), weighted_BxHxTx1[..., 0])

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, vals))
    arrays = (_heads_first(q), _heads_first(d_out), saved)
    parts = []
    for seen, rows in _groups(scheme, extras, k.shape[1], arrays):
        sums, part = jax.lax.scan(functools.partial(block, seen), sums, rows)
        parts.append(part)
    d_q, weighted = jax.tree.map(lambda *groups: _joined(groups, q.shape[1]), *parts)
    d_k, d_v = (_heads_first(x) for x in sums)
    return (
        _heads_first(d_q),
        d_k.astype(k.dtype),
        d_v.astype(v.dtype),
        sink_gradient(extras.sink, saved, weighted),
    )


def _added(total: jax.Array, new: jax.Array) -> jax.Array:
    """Adds to the first keys, in place; `at[].add` would be a scatter."""
    sums = total[:, :, : new.shape[2]] + new
    return jax.lax.dynamic_update_slice(total, sums, (0, 0, 0, 0))


def sink_gradient(
    sink: jax.Array | None, logsumexp_BxHxT: jax.Array, weighted_BxHxT: jax.Array
) -> jax.Array | None:
    """`-sum exp(z - L) D` by head, float32 [H]; None without a sink."""
    if sink is None:
        return None
    probs_BxHxT = jnp.exp(sink[None, :, None] - logsumexp_BxHxT)
    return -jnp.sum(probs_BxHxT * weighted_BxHxT, axis=(0, 2))


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, T, H, K] <-> [B, H, T, K]."""
    return jnp.swapaxes(x, 1, 2)


def _groups(scheme: Scheme, extras: Extras, keys: int, arrays: Any) -> Iterator[tuple[int, Block]]:
    """Yields (keys that are looked at, blocks of `arrays` [B, H, T, ...]), in the order of queries.

    Causal queries see few keys at first: so many runs of blocks look at as many as their last one.
    """
    queries = jax.tree.leaves(arrays)[0].shape[2]
    size = min(BLOCK, queries)
    count = -(-queries // size)
    indices = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)
    blocks = jax.tree.map(lambda x: _blocks(x, count, size), arrays)
    causal = scheme.causal and extras.first is None
    run = -(-count // CAUSAL_GROUPS) if causal else count
    for start in range(0, count, run):
        seen = min(keys, (start + run) * size) if causal else keys
        yield seen, jax.tree.map(lambda x, s=start: x[s : s + run], (indices, blocks))


def _blocks(x: jax.Array, count: int, size: int) -> jax.Array:
    """[B, H, T, ...] -> [count, B, H, size, ...], zeros behind T."""
    missing = count * size - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, *x.shape[3:]), 2, 0)


def _joined(groups: tuple[jax.Array, ...], queries: int) -> jax.Array:
    """Groups of [n, B, H, size, ...] -> [B, H, queries, ...]."""
    x = jnp.moveaxis(jnp.concatenate(groups), 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :queries]


def _scores(
    scheme: Scheme, extras: Extras, indices: jax.Array, rows: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Gammas]:
    """float32 [B, H, t, S], the lowest number where a key is hidden; and the rows' gammas."""
    scores = scheme.scale * _product("BHTK,BHSK->BHTS", rows, keys)
    count = keys.shape[2]
    seen = visible(scheme, extras, indices, jnp.arange(count, dtype=jnp.int32))
    scores = scores if seen is None else jnp.where(seen, scores, _LOWEST)
    return scores, scheme.gammas(seen, count)


def _probs(extras: Extras, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax and its log-sum-exp, infinite where a query sees nothing; the sink is in it."""
    highest = jnp.max(scores, axis=-1, keepdims=True)
    sink = None if extras.sink is None else extras.sink[None, :, None, None]
    if sink is not None:
        highest = jnp.maximum(highest, sink)
    exps = jnp.exp(scores - highest)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - highest)
    logsumexp = highest + jnp.log(total)
    blind = highest == _LOWEST
    probs = exps * jnp.where(blind, 0.0, 1.0 / total)
    return probs, jnp.where(blind, jnp.inf, logsumexp)[..., 0]


def _clipped(scheme: Scheme, probs: jax.Array, gammas: Gammas) -> jax.Array:
    return jnp.clip(scheme.stretched(probs, gammas), 0.0, 1.0) if scheme.clips else probs


def _through_clip(
    scheme: Scheme, probs: jax.Array, gammas: Gammas, d_clipped: jax.Array
) -> jax.Array:
    """The gradient of the probabilities; at a bound it passes whole, beyond it not at all."""
    if not scheme.clips:
        return d_clipped
    stretched = scheme.stretched(probs, gammas)
    inside = (stretched >= 0.0) & (stretched <= 1.0)
    return jnp.where(inside, (scheme.zeta - gammas) * d_clipped, 0.0)


def _times_dropout(
    scheme: Scheme, extras: Extras, indices: jax.Array, x_BxHxTxS: jax.Array
) -> jax.Array:
    if not scheme.dropout_rate:
        return x_BxHxTxS
    batch, heads, _, keys = x_BxHxTxS.shape
    assert extras.seed is not None  # `fused_attention` asks for it
    first = (0, 0, 0) if extras.first is None else extras.first
    places = (jnp.arange(batch, dtype=jnp.int32), jnp.arange(heads, dtype=jnp.int32), indices)
    rows = (p + f for p, f in zip(places, first, strict=True))
    axes = ((1, 2, 3), (0, 2, 3), (0, 1, 3))
    words = row_words(
        extras.seed, *(jnp.expand_dims(r, a) for r, a in zip(rows, axes, strict=True))
    )
    keep = kept(words, jnp.arange(keys, dtype=jnp.int32)[None, None, None], scheme.dropout_rate)
    return jnp.where(keep, x_BxHxTxS * (1.0 / (1.0 - scheme.dropout_rate)), 0.0)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32
    )
