"""Losses over labelled items; label -100 means that a token counts for nothing."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantizable_flax.quantization.tensor import Quantized, Tensor, beside

IGNORED = -100


class Scores(NamedTuple):
    """What a model says of a batch, by example.

    Attributes:
      loss: summed cross-entropy in nats, float32 [B].
      weight: number of labelled items, float32 [B].
      correct: number of those whose label's logit is above all others, float32 [B].
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def no_scores(batch_size: int) -> Scores:
    """Of a model without a head, or of examples without labels."""
    zero_B = jnp.zeros((batch_size,), jnp.float32)
    return Scores(zero_B, zero_B, zero_B)


def token_scores(logits_BxTxV: jax.Array, labels_BxT: jax.Array) -> Scores:
    """Returns what a model says of each sequence, over its labelled tokens.

    Args:
      logits_BxTxV: any float dtype.
      labels_BxT: the right tokens, -100 where there is none.

    Returns:
      (loss, weight, correct), float32 [B] each: summed cross-entropy in nats, labelled tokens, and
      how many of them have the highest logit.
    """
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    own_BxT, right_BxT = _judge(logits_BxTxV, labels_BxT)
    nll_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - own_BxT
    weight_BxT = (labels_BxT != IGNORED).astype(jnp.float32)
    return Scores(
        jnp.sum(nll_BxT * weight_BxT, axis=1),
        jnp.sum(weight_BxT, axis=1),
        jnp.sum(jnp.where(right_BxT, weight_BxT, 0.0), axis=1),
    )


def _judge(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., V] and [...] -> the label's logit, and whether it is above all others.

    A tie is not right: whoever predicts nothing would be, on all equal logits. Nor is a NaN
    anywhere, nor a label out of range, whose logit is 0 here.
    """
    # A masked sum, no gather: every device looks among its own part of the vocabulary.
    tokens = jnp.arange(logits.shape[-1])
    is_label = beside(tokens, logits) == labels[..., None].astype(tokens.dtype)
    own = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    highest_other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    known = (labels >= 0) & (labels < logits.shape[-1])
    return own, known & (own > highest_other)


def chunked_scores(
    logits_of: Callable[[jax.Array], jax.Array],
    x_BxTxD: jax.Array,
    labels_BxT: jax.Array,
    chunk: int,
) -> Scores:
    """`token_scores(logits_of(x), labels)` whose logits never exist all at once.

    The backward pass computes them again, chunk by chunk.

    Args:
      logits_of: [B, c, D] -> [B, c, V]; what it reads must be arrays, no state of a module.
      x_BxTxD: what the head multiplies.
      labels_BxT: labels, -100 for none.
      chunk: positions of each sequence at a time; 0 for all of them.
    """
    batch, length = labels_BxT.shape
    if not chunk or length <= chunk:
        return token_scores(logits_of(x_BxTxD), labels_BxT)
    count = -(-length // chunk)
    chunk = -(-length // count)
    missing = ((0, 0), (0, count * chunk - length))
    labels_BxT = jnp.pad(labels_BxT, missing, constant_values=IGNORED)
    x_BxTxD = jnp.pad(x_BxTxD, (*missing, (0, 0)))

    def split(a: jax.Array) -> jax.Array:
        # Every count-th position, so that a chunk of split sequences lies on all devices.
        return jnp.moveaxis(a.reshape(batch, chunk, count, *a.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop keeps the two apart
    def add(sums: Scores, part: tuple[jax.Array, jax.Array]):
        x, labels = part
        return jax.tree.map(jnp.add, sums, token_scores(logits_of(x), labels)), None

    zero_B = jnp.zeros(batch, jnp.float32)
    parts = (split(x_BxTxD), split(labels_BxT))
    return jax.lax.scan(add, Scores(zero_B, zero_B, zero_B), parts)[0]


def class_scores(logits_BxC: jax.Array, target_BxC: jax.Array, labels_B: jax.Array) -> Scores:
    """Cross-entropy of each example against a distribution over classes; each weighs 1."""
    logits_BxC = logits_BxC.astype(jnp.float32)
    log_probs_BxC = jax.nn.log_softmax(logits_BxC, axis=-1)
    _, right_B = _judge(logits_BxC, labels_B)
    return Scores(
        -jnp.sum(target_BxC * log_probs_BxC, axis=-1),
        jnp.ones(labels_B.shape, jnp.float32),
        right_B.astype(jnp.float32),
    )


def smooth_targets(labels_B: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """One-hot labels that give `smoothing` of their mass to all classes evenly: [B, C]."""
    one_hot = jax.nn.one_hot(labels_B, classes, dtype=jnp.float32)
    return (1.0 - smoothing) * one_hot + smoothing / classes


def select_labelled(x_BxTxD: Tensor, labels_BxT: jax.Array, count: int) -> tuple[Tensor, jax.Array]:
    """Gathers the first `count` labelled positions of each sequence, [B, count, D] and [B, count].

    Sequences with fewer labels are filled up with unlabelled positions. The decoder then works on
    some 15 % of the tokens, which is most of its cost saved.
    """
    # A stable sort puts labelled positions first and keeps their order.
    positions = jnp.argsort(labels_BxT == IGNORED, axis=1, stable=True)[:, :count]

    def pick(a_BxTxD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(a_BxTxD, positions[..., None], axis=1)

    x = x_BxTxD.moved(pick) if isinstance(x_BxTxD, Quantized) else pick(x_BxTxD)
    return x, jnp.take_along_axis(labels_BxT, positions, axis=1)
