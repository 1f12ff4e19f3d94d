"""How far a student is from its teacher: hidden states, embeddings, distributions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.features import Features, unit
from quantizable_flax.models.metric import FIDELITY, PERPLEXITY


class Outputs(NamedTuple):
    """What is compared of a model.

    Attributes:
      features: before the head.
      logits_BxPxV: at some positions of each sequence, or at one for classes; None without.
    """

    features: Features
    logits_BxPxV: jax.Array | None


class Distances(NamedTuple):
    """Of each example, float32.

    Attributes:
      hidden_B: squared error of the hidden states by width, summed over visible tokens.
      tokens_B: how many those are.
      layers_B: squared error of the activations at some sites by width, summed over visible tokens
        and averaged over the sites; None without.
      pooled_B: 1 - cosine of the embeddings.
      logits_B: KL(teacher || student) in nats, averaged over positions; None without logits.
    """

    hidden_B: jax.Array
    tokens_B: jax.Array
    layers_B: jax.Array | None
    pooled_B: jax.Array
    logits_B: jax.Array | None


def outputs(
    model: nn.Module, batch: dict[str, jax.Array], *, positions: int, train: bool = False
) -> Outputs:
    """Returns what is compared; to be called by `model.apply(..., method=outputs)`.

    Args:
      model: of any family.
      batch: as `model.features` takes it.
      positions: of each sequence at most so many have logits, 0 for no logits at all.
      train: as in `model.features`.
    """
    family: Any = model
    features = family.features(batch, train=train)
    if not positions or family.metric is FIDELITY:
        return Outputs(features, None)
    hidden_BxTxD = features.hidden_BxTxD.astype(family.config.dtype)
    if family.metric is PERPLEXITY:
        some_BxPxD = spread(hidden_BxTxD, features.visible_BxT, positions)
        return Outputs(features, family.predict(some_BxPxD, train=train))
    return Outputs(features, family.predict(hidden_BxTxD, train=train)[:, None])


def spread(x_BxTxD: jax.Array, visible_BxT: jax.Array, count: int) -> jax.Array:
    """Gathers `count` visible positions of each sequence, or T, spread evenly: [B, count, D].

    A sequence with fewer tokens shows each of them about equally often.
    """
    count = min(count, x_BxTxD.shape[1])
    seen_BxT = visible_BxT.astype(bool)
    # A stable sort puts visible positions first and keeps their order.
    positions_BxT = jnp.argsort(~seen_BxT, axis=1, stable=True)
    length_Bx1 = jnp.sum(seen_BxT, axis=1, keepdims=True, dtype=jnp.int32)
    middles_1xP = 2 * jnp.arange(count, dtype=jnp.int32)[None] + 1
    chosen_BxP = jnp.take_along_axis(positions_BxT, middles_1xP * length_Bx1 // (2 * count), axis=1)
    return jnp.take_along_axis(x_BxTxD, chosen_BxP[..., None], axis=1)


def distances(
    student: Outputs,
    teacher: Outputs,
    layers: Sequence[tuple[jax.Array, jax.Array]] = (),
) -> Distances:
    """Returns the distances of a student, by which a loss may be differentiated.

    Args:
      student: what it computes.
      teacher: the same of the teacher.
      layers: pairs of activations [B, T, ...], of the student and of the teacher.
    """
    ours, theirs = student.features, teacher.features

    def far(x_BxTxD: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        difference = x_BxTxD.astype(jnp.float32) - y_BxTxD.astype(jnp.float32)
        error_BxT = jnp.mean(jnp.square(difference), axis=range(2, difference.ndim))
        return jnp.sum(error_BxT * ours.visible_BxT, axis=1)

    layers_B = None
    if layers:
        layers_B = jnp.mean(jnp.stack([far(x, y) for x, y in layers]), axis=0)
    logits_B = None
    if student.logits_BxPxV is not None and teacher.logits_BxPxV is not None:
        logits_B = divergence(teacher.logits_BxPxV, student.logits_BxPxV)
    return Distances(
        far(ours.hidden_BxTxD, theirs.hidden_BxTxD),
        jnp.sum(ours.visible_BxT, axis=1),
        layers_B,
        # 1 - cosine of unit vectors, without the difference of two numbers near 1.
        jnp.sum(jnp.square(unit(ours.pooled_BxD) - unit(theirs.pooled_BxD)), axis=1) / 2,
        logits_B,
    )


def divergence(teacher_BxPxV: jax.Array, student_BxPxV: jax.Array) -> jax.Array:
    """KL(teacher || student) of logits, averaged over positions: [B]."""
    theirs, ours = (
        jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (teacher_BxPxV, student_BxPxV)
    )
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axis=1)
