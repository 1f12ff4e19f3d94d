"""BERT's loss: what `max_predictions` may not change, and how it is summed."""

import jax
import numpy as np
import pytest

from quantizable_flax import build_model
from tests.helpers import deviation, golden_names, is_key_bias, pairs
from tests.models.golden_case import Case, load


@pytest.fixture(scope="module", params=golden_names("model_bert_*")[-1:])
def case(request) -> Case:
    return load(request.param)


def test_max_predictions_changes_neither_loss_nor_gradients(case):
    most = int((case.batch["labels"] != -100).sum(axis=1).max())
    config = case.config.copy_and_resolve_references()
    config.model.max_predictions = most
    loss, grads = case.loss_and_grads(build_model(config))
    np.testing.assert_allclose(loss, case.result[0], rtol=1e-6)
    for path, actual, expected in pairs(grads, case.result[1]):
        if not is_key_bias(path):
            # The head's sums run over other rows: measured 5e-6.
            assert deviation(actual, expected) < 1e-4, path


def test_loss_is_summed_and_counted_per_sequence(case):
    apply = jax.jit(case.model.apply, static_argnames="method")
    scores = apply({"params": case.params}, case.batch, method="loss")
    labels = np.asarray(case.batch["labels"])
    np.testing.assert_array_equal(scores.weight, (labels != -100).sum(axis=1))
    logits = np.asarray(apply({"params": case.params}, *case.inputs()), np.float64)
    right = (logits.argmax(-1) == labels).sum(axis=1)
    np.testing.assert_array_equal(scores.correct, right)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected = -(picked * (labels != -100)).sum(axis=1)
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-5)
