"""Whole models against the original: logits, loss, hidden states, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import deviation, golden_names, is_key_bias, pairs
from tests.models.golden_case import Case, load

# A few layers of float32 sums in another order: measured 1e-6 for values and 2e-5 for gradients.
FORWARD, BACKWARD = 1e-5, 1e-4


@pytest.fixture(scope="module", params=golden_names("model_*"))
def case(request) -> Case:
    return load(request.param)


def like(actual, expected: np.ndarray):
    """The leading part of actual that the file holds: the subset keeps a few tokens only."""
    return actual[tuple(slice(size) for size in expected.shape)]


def test_logits_and_hidden_states_match(case):
    actual = case.outputs(case.model, *case.inputs())
    if case.family != "vit":
        ids, _, *rest = case.inputs(1)
        actual["logits_nomask_row0"] = case.outputs(case.model, ids, None, *rest)["logits"]
    expected = case.file.group("out")
    assert set(actual) == set(expected) - {"loss"}
    for name, value in actual.items():
        assert deviation(like(value, expected[name]), expected[name]) < FORWARD, name


def test_loss_matches(case):
    loss, _ = case.result
    np.testing.assert_allclose(loss, case.file["out/loss"], rtol=1e-6)


def test_every_gradient_norm_matches(case):
    norms = case.file.config["gradnorm"]
    filled = {name: np.full(w.shape, norms[name]) for name, w in case.weights.items()}
    largest = max(norms.values())
    for path, grad, expected in pairs(case.result[1], case.ours(filled)):
        # The original keeps one gate tensor per head, we stack them: one norm per head.
        axes = tuple(range(1, grad.ndim)) if "gate" in path else None
        norm = np.sqrt(np.sum(np.square(grad), axis=axes))
        expected = expected.reshape(*norm.shape, -1)[..., 0]
        scale = largest if is_key_bias(path) else np.abs(expected)
        assert np.all(np.abs(norm - expected) <= BACKWARD * scale), path


@pytest.mark.parametrize("name", golden_names("model_[bo]*"))  # those of ViT hold norms alone
def test_vector_gradients_match_element_by_element(name):
    case = load(name)
    known = case.file.group("grad")
    filled = {name: known.get(name, np.full(w.shape, np.nan)) for name, w in case.weights.items()}
    largest = max(np.abs(grad).max() for grad in known.values())
    compared = 0
    for path, grad, expected in pairs(case.result[1], case.ours(filled)):
        if np.isnan(expected).any():
            continue
        scale = largest if is_key_bias(path) else np.abs(expected).max()
        assert np.abs(grad - expected).max() < BACKWARD * scale, path
        compared += 1
    assert compared >= len(known) // 5  # gates of several heads are one tensor here


@pytest.mark.parametrize("name", golden_names("model_opt_*")[:1])
def test_opt_with_our_softmax_differs_at_padded_queries_alone(name):
    case = load(name)
    mask = case.batch["attention_mask"]
    seeing = np.cumsum(mask, axis=1) > 0  # a row sees itself or something before it
    assert 0 < (~seeing).sum() < seeing.size
    # A label belongs to the prediction one place before it.
    predicted = np.pad(seeing, ((0, 0), (1, 0)))[:, :-1]
    labels = np.where(predicted, case.batch["labels"], -100)
    assert np.any(labels != case.batch["labels"])

    def outputs(model, batch):
        return model(batch["input_ids"], batch["attention_mask"]), model.loss(batch).loss

    (ours, our_loss), (theirs, their_loss) = (
        jax.jit(functools.partial(model.apply, method=outputs))(
            {"params": case.params}, {**case.batch, "labels": jnp.asarray(labels)}
        )
        for model in (case.own_model, case.model)
    )
    assert deviation(ours[seeing], theirs[seeing]) < FORWARD
    assert deviation(ours[~seeing], theirs[~seeing]) > 0.01
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-6)
