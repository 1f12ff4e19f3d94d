"""Attention as a function, with the arguments of `jax.nn.dot_product_attention` and a softmax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.nn.attention import attention_context, attention_scores
from quantizable_flax.nn.fused import KERNELS, choose, fused
from quantizable_flax.nn.mask import Mask, dense
from quantizable_flax.nn.softmax_config import VANILLA, SoftmaxConfig
from quantizable_flax.quantization.tensor import beside

JAX_NAMES: dict[str | None, str] = {None: "auto", "xla": "unfused"}  # of `implementation`


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = "auto",
    softmax: SoftmaxConfig = VANILLA,
    sink: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention of any softmax, by a fused program where there is one.

    As `jax.nn.dot_product_attention`, but for the softmax and its dropout; rows that see nothing
    are zero (or as `softmax.blind_queries` says). For example
    `dot_product_attention(q, k, v, is_causal=True, softmax=make_softmax("clipped", gamma=-0.03))`.
    A bias, a window, or a mask that differs from query to query (but a `Mask`) takes the way with
    whole matrices.

    Args:
      query: [B, T, H, K] or [T, H, K].
      key, value: [B, S, G, K], or without B; G divides H.
      bias: added to the scores, broadcasts to [B, H, T, S].
      mask: True where a key is seen, broadcasts to [B, H, T, S]; or a `Mask`.
      scale: of the scores, 1 / sqrt(K) if None.
      is_causal: whether query i sees the keys up to i alone.
      query_seq_lengths, key_value_seq_lengths: int [B], what is behind them is padding.
      local_window_size: how many keys are seen to the left and right, or both numbers.
      implementation: "auto" (or None), "unfused" (or "xla"), "blockwise", "cudnn", "gpu" or "tpu";
        see `nn.fused`. All but unfused ones have no forward-mode derivatives.
      softmax: which one, as `make_softmax` gives it; no function.
      sink: float32 [H], the logits of `softmax.sink="learned"`.
      dropout_rate: of the probabilities.
      dropout_key: a PRNG key, needed with dropout.

    Returns:
      [B, T, H, K] (or without B) in the dtype of value.

    Raises:
      UserError: heads that do not fit, dropout without a key, or an implementation that is not
        here or cannot compute this.
    """
    implementation = JAX_NAMES.get(implementation) or str(implementation)
    check_choice("implementation", implementation, KERNELS)
    single = query.ndim == 3
    if single:
        query, key, value = (x[None] for x in (query, key, value))
    _check(softmax, query, key, value, mask)
    if dropout_rate and dropout_key is None:
        raise UserError("attention dropout needs a dropout_key, found None.")
    key, value = (for_each_head(x, query.shape[-2]) for x in (key, value))
    queries, keys = query.shape[1], key.shape[1]
    seen = as_mask(mask, query.shape[0], is_causal)
    if key_value_seq_lengths is not None:
        seen = _both(seen, Mask(_below(key_value_seq_lengths, keys)), queries, keys)
    if local_window_size is not None:
        seen = _both(seen, _window(local_window_size, queries, keys), queries, keys)
    if bias is not None and implementation not in ("auto", "unfused"):
        raise UserError(f"implementation={implementation} cannot add a bias: choose auto.")
    path = (
        "unfused" if bias is not None else choose(implementation, softmax, seen, query, key, value)
    )
    attend: Callable[..., jax.Array] = functools.partial(fused, path)
    if path == "unfused":
        attend = functools.partial(unfused, bias=bias)
    context = attend(
        softmax,
        query,
        key,
        value,
        seen,
        sink_H=sink,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        scale=scale,
    )
    if query_seq_lengths is not None:
        known = _below(query_seq_lengths, queries)[:, :, None, None]
        context = jnp.where(known, context, jnp.zeros_like(context))
    return context[0] if single else context


def _check(softmax: Any, query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> None:
    """Raises UserError for what would fail in a product, or be something else in silence."""
    if not isinstance(softmax, SoftmaxConfig):
        raise UserError(
            "softmax must be what qf.make_softmax gives, found "
            f"{getattr(softmax, '__name__', repr(softmax))}: a function of your own goes into "
            "qf.MultiHeadAttention."
        )
    shapes = ", ".join(str(x.shape) for x in (query, key, value))
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (query, key, value)):
        raise UserError(f"query, key and value must be floats, found {query.dtype}.")
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise UserError(
            f"query must be [B, T, H, K], key and value [B, S, G, K], found {shapes}: the width of "
            "a head and the number of keys must be the same."
        )
    if mask is None or isinstance(mask, Mask):
        return
    wanted = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    try:
        fits = np.broadcast_shapes(mask.shape, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        raise UserError(
            f"mask must broadcast to [B, H, T, S], here {wanted}, found {mask.shape}: give it "
            "those axes."
        )


def unfused(
    softmax: SoftmaxConfig,
    q_BxTxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    mask: jax.Array | Mask | None = None,
    *,
    sink_H: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """As `nn.fused.fused`, by way of all scores and probabilities."""
    scores = attention_scores(q_BxTxHxK, k_BxSxHxK, scale=scale)
    if bias is not None:
        scores = scores + beside(bias.astype(scores.dtype), scores)
    probs = softmax(scores, dense(mask, *scores.shape[-2:]), sink_H)
    if dropout_rate and dropout_key is not None:
        probs = dropped(probs, dropout_rate, dropout_key)
    return attention_context(probs, v_BxSxHxK)


def dropped(probs: jax.Array, rate: float, key: jax.Array, *, broadcast: bool = False) -> jax.Array:
    """Probabilities after dropout; broadcast means one mask for all of the batch and heads."""
    keep = 1.0 - rate
    shape = (1,) * (probs.ndim - 2) + probs.shape[-2:] if broadcast else probs.shape
    return jnp.where(jax.random.bernoulli(key, keep, shape), probs / keep, 0.0)


def as_mask(mask: jax.Array | Mask | None, batch: int, causal: bool) -> jax.Array | Mask | None:
    """A `Mask` where the array says no more than one, else the array."""
    if mask is None:
        return Mask(causal=causal) if causal else None
    if isinstance(mask, Mask):
        return dataclasses.replace(mask, causal=mask.causal or causal)
    mask = mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[1:3] == (1, 1):
        return Mask(jnp.broadcast_to(mask[:, 0, 0], (batch, mask.shape[-1])), causal)
    return mask & jnp.tril(jnp.ones(mask.shape[-2:], bool))[None, None] if causal else mask


def _both(one, other, queries: int, keys: int) -> jax.Array | Mask:
    """Keys that both masks show."""
    if one is None:
        return other
    if isinstance(one, Mask) and isinstance(other, Mask) and one.visible_BxS is None:
        return dataclasses.replace(one, visible_BxS=other.visible_BxS)
    parts = (dense(mask, queries, keys) for mask in (one, other))
    return functools.reduce(jnp.logical_and, (part for part in parts if part is not None))


def _below(lengths_B: jax.Array, size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)[None, :] < lengths_B.astype(jnp.int32)[:, None]


def _window(size: int | tuple[int, int], queries: int, keys: int) -> jax.Array:
    left, right = (size, size) if isinstance(size, int) else size
    distance = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
    return ((distance >= -left) & (distance <= right))[None, None]


def for_each_head(x_BxSxGxK: jax.Array, heads: int) -> jax.Array:
    """[B, S, G, K] -> [B, S, H, K]: neighbouring heads share one where there are fewer.

    Raises:
      UserError: G does not divide H.
    """
    groups = x_BxSxGxK.shape[-2]
    if heads % groups:
        raise UserError(
            f"the number of key and value heads must divide that of query heads, found {groups} "
            f"and {heads}."
        )
    return x_BxSxGxK if groups == heads else jnp.repeat(x_BxSxGxK, heads // groups, axis=-2)
