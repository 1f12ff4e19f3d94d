"""Losses over labels against formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.models.losses import (
    chunked_scores,
    class_scores,
    select_labelled,
    smooth_targets,
    token_scores,
)
from quantizable_flax.models.metric import PERPLEXITY, TOP1

LOGITS = 3.0 * jax.random.normal(jax.random.key(0), (3, 5, 7))


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_token_scores_by_sequence():
    labels = jnp.array([[1, -100, 3, 0, -100], [-100] * 5, [6, 5, 4, 3, 2]])
    scores = jax.device_get(token_scores(LOGITS, labels))
    log_probs = log_softmax(LOGITS)
    for b, row in enumerate(np.asarray(labels)):
        known = [(t, label) for t, label in enumerate(row) if label != -100]
        expected = -sum(log_probs[b, t, label] for t, label in known)
        np.testing.assert_allclose(scores.loss[b], expected, rtol=1e-6)
        assert scores.weight[b] == len(known)
        assert scores.correct[b] == sum(log_probs[b, t].argmax() == label for t, label in known)
    assert {x.dtype for x in scores} == {jnp.dtype("float32")}
    for own, of_rows in zip(scores, token_scores(LOGITS.reshape(15, 7), labels), strict=True):
        np.testing.assert_array_equal(own, of_rows)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("logits", "label", "right"),
    [
        ([1.0, 3.0, 2.0], 1, 1),
        ([1.0, 3.0, 2.0], 2, 0),
        ([0.0, 0.0, 0.0], 0, 0),  # whoever predicts nothing
        ([3.0, 3.0, 2.0], 0, 0),
        ([3.0, 3.0, 2.0], 1, 0),
        ([0.0, -0.0, -1.0], 0, 0),
        ([-1.0, -2.0, -3.0], 0, 1),
        ([-1.0, -2.0, -3.0], 3, 0),  # out of range: no logit is the label's
        ([-1.0, -2.0, -3.0], -1, 0),
        ([NAN, 1.0, 0.0], 1, 0),
        ([1.0, NAN, 0.0], 1, 0),
        ([NAN, NAN, NAN], 0, 0),
        ([-INF, -INF, -INF], 0, 0),
        ([1.0, -INF, -INF], 0, 1),
        ([INF, 1.0, INF], 0, 0),
    ],
)
def test_only_a_logit_above_all_others_is_right(logits, label, right, dtype):
    logits, labels = jnp.array([[logits, logits]], dtype), jnp.array([[label, -100]])
    assert token_scores(logits, labels).correct == right
    for chunk in (0, 1):
        assert chunked_scores(lambda x: x, logits, labels, chunk).correct == right
    targets = smooth_targets(labels[0], 3, 0.1)
    np.testing.assert_array_equal(class_scores(logits[0], targets, labels[0]).correct, [right, 0])


def test_labelled_positions_are_gathered_in_order():
    labels = jnp.array([[-100, 1, -100, 3, 4], [-100, -100, 2, -100, -100]])
    x, chosen = select_labelled(jnp.arange(10.0).reshape(2, 5, 1), labels, 3)
    np.testing.assert_array_equal(chosen, [[1, 3, 4], [2, -100, -100]])
    np.testing.assert_array_equal(x[0, :, 0], [1.0, 3.0, 4.0])
    assert x[1, 0, 0] == 7.0


def head_case(dtype=jnp.float32):
    """Tables and hidden states of a head with a bias, and labels; 3 sequences of 10 tokens."""
    keys = jax.random.split(jax.random.key(1), 4)
    head = {"table": jax.random.normal(keys[0], (17, 8)), "bias": jax.random.normal(keys[1], (17,))}
    labels = jax.random.randint(keys[2], (3, 10), 0, 17)
    labels = jnp.where(jnp.arange(10) % 3 == 1, -100, labels)
    return head, jax.random.normal(keys[3], (3, 10, 8)).astype(dtype), labels


def head_scores(head, x, labels, chunk: int):
    table = head["table"].astype(x.dtype)

    def logits_of(x):
        logits = jnp.einsum("nd,vd->nv", x, table, preferred_element_type=jnp.float32)
        return logits + head["bias"][None]

    return chunked_scores(logits_of, x, labels, chunk)


REDUCTIONS = {
    "total": lambda scores: scores.total,
    "scaled": lambda scores: jnp.log(scores.total / jnp.sum(scores.weight)),
    "by example": lambda scores: scores.loss @ jnp.array([0.5, -2.0, 3.0]),
    "both": lambda scores: 0.1 * scores.total**2 + scores.loss[1],
    "neither": lambda scores: jnp.sum(scores.correct) + jnp.sum(scores.weight),
}


@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_by_chunk_are_those_of_the_whole(reduction, chunk):
    head, x, labels = head_case()

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_grad(head, x, chunk):
        def loss(head, x):
            return REDUCTIONS[reduction](head_scores(head, x, labels, chunk))

        return jax.value_and_grad(loss, (0, 1))(head, x)

    expected, actual = value_and_grad(head, x, 0), value_and_grad(head, x, chunk)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_gradients_by_chunk_in_bfloat16():
    head, x, labels = head_case(jnp.bfloat16)

    def grads(chunk: int):
        return jax.grad(lambda *a: head_scores(*a, labels, chunk).total, (0, 1))(head, x)

    for a, b in zip(jax.tree.leaves(grads(2)), jax.tree.leaves(grads(0)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())


def test_gradients_of_each_sequence_by_chunk():
    head, x, labels = head_case()

    def grads(chunk: int):
        def loss(head, x, labels):
            return head_scores(head, x[None], labels[None], chunk).total

        return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(head, x, labels)

    for a, b in zip(jax.tree.leaves(grads(3)), jax.tree.leaves(grads(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reduction", "products"), [("total", 3), ("by example", 4)])
def test_the_gradient_of_the_total_computes_no_logits_again(reduction, products):
    head, x, labels = head_case()

    def loss(head, x):
        return REDUCTIONS[reduction](head_scores(head, x, labels, 5))

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(head, x)
    assert lowered.as_text().count("stablehlo.dot_general") == products


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smooth_targets(smoothing):
    labels = jnp.array([2, 0, 6])
    targets = np.asarray(smooth_targets(labels, 7, smoothing))
    expected = np.full((3, 7), smoothing / 7)
    expected[np.arange(3), labels] += 1.0 - smoothing
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_class_scores_against_a_distribution():
    logits, labels = LOGITS[:, 0], jnp.argmax(LOGITS[:, 0], axis=-1).at[1].add(-1)
    targets = np.random.default_rng(0).dirichlet(np.ones(7), 3)
    scores = class_scores(logits, jnp.asarray(targets), labels)
    np.testing.assert_allclose(scores.loss, -(targets * log_softmax(logits)).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(scores.weight, [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(scores.correct, [1.0, 0.0, 1.0])


def test_metrics_by_their_definitions():
    assert PERPLEXITY.value(2.0, 0.5) == pytest.approx(np.exp(2.0))
    assert PERPLEXITY.value(1e4, 0.0) == np.inf
    assert np.isnan(PERPLEXITY.value(np.nan, 0.0))
    assert PERPLEXITY.cost(12.0, 10.0) == pytest.approx(np.log(1.2))
    assert TOP1.value(2.0, 0.25) == 25.0
    assert TOP1.cost(70.0, 72.5) == 2.5
