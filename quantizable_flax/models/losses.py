"""Losses over labelled items; label -100 means that a token counts for nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantizable_flax.quantization.tensor import Quantized, Tensor

IGNORED = -100


class Scores(NamedTuple):
    """What a model says of a batch, by example.

    Attributes:
      loss: summed cross-entropy in nats, float32 [B].
      weight: number of labelled items, float32 [B].
      correct: number of those whose label has the largest logit, float32 [B].
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def token_scores(logits_BxTxV: jax.Array, labels_BxT: jax.Array) -> Scores:
    """Cross-entropy of each sequence over its labelled tokens."""
    labelled = labels_BxT != IGNORED
    safe_labels = jnp.where(labelled, labels_BxT, 0)
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    picked = jnp.take_along_axis(logits_BxTxV, safe_labels[..., None], axis=-1)[..., 0]
    nll_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked
    weight_BxT = labelled.astype(jnp.float32)
    right_BxT = (picked == jnp.max(logits_BxTxV, axis=-1)) * weight_BxT
    return Scores(
        jnp.sum(nll_BxT * weight_BxT, axis=1),
        jnp.sum(weight_BxT, axis=1),
        jnp.sum(right_BxT, axis=1),
    )


def class_scores(logits_BxC: jax.Array, target_BxC: jax.Array, labels_B: jax.Array) -> Scores:
    """Cross-entropy of each example against a distribution over classes; each weighs 1."""
    log_probs_BxC = jax.nn.log_softmax(logits_BxC.astype(jnp.float32), axis=-1)
    right_B = jnp.argmax(logits_BxC, axis=-1) == labels_B
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
