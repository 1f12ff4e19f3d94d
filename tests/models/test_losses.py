"""Losses over labels against formulas in float64."""

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
