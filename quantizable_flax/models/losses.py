"""Losses over labelled items; label -100 means that a token counts for nothing."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from quantizable_flax.nn.partition import is_partitioned, platform, splits_length
from quantizable_flax.quantization.tensor import Quantized, Tensor, beside

IGNORED = -100
FEWEST_ROWS = 256  # of logits at a time on a CPU


class Scores(NamedTuple):
    """What a model says of a batch, by example.

    Attributes:
      loss: summed cross-entropy in nats, float32 [B].
      weight: number of labelled items, float32 [B].
      correct: number of those whose label's logit is above all others, float32 [B].
      total: sum of loss, a float32 scalar; of `chunked_scores` the cheaper one to differentiate.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, loss_B: jax.Array, weight_B: jax.Array, correct_B: jax.Array) -> "Scores":
        """With their total."""
        return cls(loss_B, weight_B, correct_B, jnp.sum(loss_B))


def no_scores(batch_size: int) -> Scores:
    """Of a model without a head, or of examples without labels."""
    zero_B = jnp.zeros((batch_size,), jnp.float32)
    return Scores.of(zero_B, zero_B, zero_B)


def count_labels(labels: jax.Array, *, causal: bool) -> jax.Array:
    """How many labels a batch scores: the sum of the weights of its `Scores`.

    Args:
      labels: of tokens [B, T], -100 for none; or classes [B].
      causal: whether each token predicts the next one, so that the first has no prediction.
    """
    if labels.ndim == 1:
        return jnp.float32(labels.size)
    return jnp.sum(labels[:, int(causal) :] != IGNORED, dtype=jnp.float32)


def token_scores(logits_BxTxV: jax.Array, labels_BxT: jax.Array) -> Scores:
    """Returns what a model says of each sequence, over its labelled tokens.

    Args:
      logits_BxTxV: any float dtype; or as rows, [B * T, V].
      labels_BxT: the right tokens, -100 where there is none.

    Returns:
      (loss, weight, correct), float32 [B] each: summed cross-entropy in nats, labelled tokens, and
      how many of them have the highest logit.
    """
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    own, right = _judge(logits_BxTxV, labels_BxT.reshape(logits_BxTxV.shape[:-1]))
    nll_BxT = (jax.nn.logsumexp(logits_BxTxV, axis=-1) - own).reshape(labels_BxT.shape)
    right_BxT = right.reshape(labels_BxT.shape)
    weight_BxT = (labels_BxT != IGNORED).astype(jnp.float32)
    return Scores.of(
        jnp.sum(nll_BxT * weight_BxT, axis=1),
        jnp.sum(weight_BxT, axis=1),
        jnp.sum(jnp.where(right_BxT, weight_BxT, 0.0), axis=1),
    )


def _judge(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., V] and [...] -> the label's logit, and whether it is above all others.

    A tie is not right: whoever predicts nothing would be, on all equal logits. Nor is a NaN
    anywhere, nor a label out of range, whose logit is 0 here.
    """
    known = (labels >= 0) & (labels < logits.shape[-1])
    tokens = jnp.arange(logits.shape[-1])
    is_label = beside(tokens, logits) == labels[..., None].astype(tokens.dtype)
    if platform() == "cpu" and not is_partitioned():
        found = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[..., None], axis=-1)
        own = jnp.where(known, found[..., 0], 0.0)
    else:  # a masked sum: every device looks among its own part of the vocabulary
        own = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    highest_other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return own, known & (own > highest_other)


def chunked_scores(
    logits_of: Callable[[Any], jax.Array],
    x_BxTxD: Tensor,
    labels_BxT: jax.Array,
    chunk: int,
) -> Scores:
    """`token_scores(logits_of(x), labels)` whose logits never exist all at once.

    The gradient of the total is made beside it in the forward pass; that of `loss` computes the
    logits again, chunk by chunk.

    Args:
      logits_of: [..., D] -> [..., V], called with rows, or with [B, c, D] where a mesh splits
        sequences; what it reads must be arrays, no state of a module.
      x_BxTxD: what the head multiplies, an array or a tensor on a grid.
      labels_BxT: labels, -100 for none.
      chunk: positions of each sequence at a time, on a CPU at most; 0 for all of them.
    """
    if isinstance(x_BxTxD, Quantized) and jnp.ndim(x_BxTxD.scale):
        x_BxTxD = x_BxTxD.values()
    elif isinstance(x_BxTxD, Quantized):
        on_grid, of_tensor = x_BxTxD, logits_of
        x_BxTxD, logits_of = on_grid.codes, lambda codes: of_tensor(on_grid.with_codes(codes))
    batch, length = labels_BxT.shape
    chunk = min(chunk, _in_cache(batch, x_BxTxD.shape[-1]))

    def of_rows(x: jax.Array) -> jax.Array:
        # In [B, c, V] XLA:TPU makes the positions columns, and turns the gradient by a copy.
        return logits_of(x if splits_length() else x.reshape(-1, x.shape[-1]))

    if not chunk or length <= chunk:
        return token_scores(of_rows(x_BxTxD), labels_BxT)
    count = -(-length // chunk)
    chunk = -(-length // count)
    missing = ((0, 0), (0, count * chunk - length))
    labels_BxT = jnp.pad(labels_BxT, missing, constant_values=IGNORED)
    x_BxTxD = jnp.pad(x_BxTxD, (*missing, (0, 0)))

    def split(a: jax.Array) -> jax.Array:
        # Every count-th position, so that a chunk of split sequences lies on all devices.
        return jnp.moveaxis(a.reshape(batch, chunk, count, *a.shape[2:]), 2, 0)

    x_NxBxCxD, labels_NxBxC = split(x_BxTxD), split(labels_BxT)
    converted, read = jax.closure_convert(of_rows, x_NxBxCxD[0])
    return _by_chunks(converted, read, x_NxBxCxD, labels_NxBxC)


def _in_cache(batch: int, width: int) -> int:
    """Positions of each sequence whose logits a CPU's cache should hold.

    Fewer rows than the table is wide would move more of its gradient, added up chunk by chunk, than
    they keep of logits from memory.
    """
    if platform() != "cpu" or is_partitioned():
        return sys.maxsize
    return -(-max(FEWEST_ROWS, width) // max(batch, 1))


def _sums(
    logits_of: Callable, read: Sequence[jax.Array], x_NxBxCxD: jax.Array, labels_NxBxC: jax.Array
) -> Scores:
    """Sums of `token_scores(logits_of(x, *read), labels)` over N chunks."""

    # For the gradient of the loss by example; prevent_cse: a loop keeps the two apart.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums: Scores, part: tuple[jax.Array, jax.Array]):
        x, labels = part
        return jax.tree.map(jnp.add, sums, token_scores(logits_of(x, *read), labels)), None

    sums = no_scores(labels_NxBxC.shape[1])
    return jax.lax.scan(add, sums, (x_NxBxCxD, labels_NxBxC))[0]


def _forward(logits_of: Callable, *arguments: Any) -> tuple[Scores, Any]:
    """Makes the gradients of the total beside the scores, while a chunk's logits exist."""
    read, x_NxBxCxD, labels_NxBxC = inputs = jax.tree.map(lambda a: a.value, arguments)

    def add(carry: tuple[Scores, Any], part: tuple[jax.Array, jax.Array]):
        (sums, d_read), (x, labels) = carry, part

        def loss(read: Sequence[jax.Array], x: jax.Array) -> tuple[jax.Array, Scores]:
            scores = token_scores(logits_of(x, *read), labels)
            return scores.total, scores

        grads, scores = jax.grad(loss, (0, 1), has_aux=True)(read, x)
        return jax.tree.map(jnp.add, (sums, d_read), (scores, grads[0])), grads[1]

    zeros = no_scores(labels_NxBxC.shape[1]), jax.tree.map(jnp.zeros_like, read)
    (scores, d_read), d_x_NxBxCxD = jax.lax.scan(add, zeros, (x_NxBxCxD, labels_NxBxC))
    return scores, (inputs, (d_read, d_x_NxBxCxD))


def _backward(logits_of: Callable, kept: Any, cotangents: Scores) -> tuple[Any, Any, None]:
    """Scales those gradients; weights by example compute them anew, chunk by chunk."""
    (*inputs, labels_NxBxC), grads = kept
    loss_B, total = cotangents.loss, cotangents.total
    if isinstance(total, SymbolicZero):
        total = jnp.float32(0.0)
    if isinstance(loss_B, SymbolicZero):
        grads = jax.tree.map(lambda g: (g.astype(jnp.float32) * total).astype(g.dtype), grads)
        return (*grads, None)

    def losses(read: Sequence[jax.Array], x_NxBxCxD: jax.Array) -> jax.Array:
        return _sums(logits_of, read, x_NxBxCxD, labels_NxBxC).loss

    return (*jax.vjp(losses, *inputs)[1](loss_B + total), None)


_by_chunks = jax.custom_vjp(_sums, nondiff_argnums=(0,))
_by_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def class_scores(logits_BxC: jax.Array, target_BxC: jax.Array, labels_B: jax.Array) -> Scores:
    """Cross-entropy of each example against a distribution over classes; each weighs 1."""
    logits_BxC = logits_BxC.astype(jnp.float32)
    log_probs_BxC = jax.nn.log_softmax(logits_BxC, axis=-1)
    _, right_B = _judge(logits_BxC, labels_B)
    return Scores.of(
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
