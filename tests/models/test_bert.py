"""BERT against the original: logits, loss, hidden states, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import build_model
from quantizable_flax.interop import from_state_dict
from tests.helpers import batch_of, bert_config, deviation, golden, golden_names

# Two layers of float32 sums in another order: measured 1e-6 for values and 1e-5 for gradients.
FORWARD, BACKWARD = 1e-5, 1e-4


class Case:
    """A golden model: its config, our model and params, the golden batch."""

    def __init__(self, name: str):
        self.file = golden(name)
        self.config = bert_config(self.file.config)
        self.weights = self.file.group("w")
        self.params = jax.tree.map(jnp.asarray, self.ours(self.weights))
        self.model = build_model(self.config)
        self.batch = batch_of(self.file)

    def ours(self, tensors):
        """Weights, or gradients, under the original's names as our tree."""
        return from_state_dict(tensors, self.config)

    def loss_and_grads(self, model):
        def mean_loss(params):
            total_B, count_B = model.apply({"params": params}, self.batch, method="loss")
            return total_B.sum() / count_B.sum()

        return jax.jit(jax.value_and_grad(mean_loss))(self.params)

    @functools.cached_property
    def result(self):
        return self.loss_and_grads(self.model)

    def inputs(self, rows: int | None = None):
        keys = ("input_ids", "attention_mask", "token_type_ids")
        return tuple(self.batch[key][:rows] for key in keys)


@pytest.fixture(scope="module", params=golden_names("model_bert_*"))
def case(request) -> Case:
    return Case(request.param)


def like(actual, expected: np.ndarray):
    """The leading part of actual that the file holds: the subset keeps a few tokens only."""
    return actual[tuple(slice(size) for size in expected.shape)]


def test_logits_and_hidden_states_match(case):
    def outputs(model, ids, mask, types):
        return {
            "hidden_0": model.embeddings(ids, types, train=False),
            "hidden_last": model.encode(ids, mask, types),
            "logits": model(ids, mask, types),
        }

    variables = {"params": case.params}
    apply = functools.partial(case.model.apply, method=outputs)
    actual = jax.jit(apply)(variables, *case.inputs())
    ids, _, types = case.inputs(1)
    actual["logits_nomask_row0"] = jax.jit(apply)(variables, ids, None, types)["logits"]
    for name, value in actual.items():
        expected = case.file[f"out/{name}"]
        assert deviation(like(value, expected), expected) < FORWARD, name


def test_loss_matches(case):
    loss, _ = case.result
    np.testing.assert_allclose(loss, case.file["out/loss"], rtol=1e-6)


def is_key_bias(path) -> bool:
    return "'key']['bias'" in jax.tree_util.keystr(path)


def test_every_gradient_norm_matches(case):
    norms = case.file.config["gradnorm"]
    filled = {name: np.full(w.shape, norms[name]) for name, w in case.weights.items()}
    largest = max(norms.values())
    for (path, grad), expected in zip(
        jax.tree.leaves_with_path(case.result[1]),
        jax.tree.leaves(case.ours(filled)),
        strict=True,
    ):
        # The original keeps one gate tensor per head, we stack them: one norm per head.
        axes = tuple(range(1, grad.ndim)) if "gate" in str(path) else None
        norm = np.sqrt(np.sum(np.square(grad), axis=axes))
        expected = expected.reshape(*norm.shape, -1)[..., 0]
        # A key bias moves all scores of a row alike, which softmax ignores: its exact gradient
        # is 0, both sides hold noise, and only its absolute size says anything.
        scale = largest if is_key_bias(path) else np.abs(expected)
        assert np.all(np.abs(norm - expected) <= BACKWARD * scale), jax.tree_util.keystr(path)


def test_vector_gradients_match_element_by_element(case):
    known = case.file.group("grad")
    filled = {name: known.get(name, np.full(w.shape, np.nan)) for name, w in case.weights.items()}
    largest = max(np.abs(grad).max() for grad in known.values())
    compared = 0
    for (path, grad), expected in zip(
        jax.tree.leaves_with_path(case.result[1]),
        jax.tree.leaves(case.ours(filled)),
        strict=True,
    ):
        if np.isnan(expected).any():
            continue
        scale = largest if is_key_bias(path) else np.abs(expected).max()
        assert np.abs(grad - expected).max() < BACKWARD * scale, jax.tree_util.keystr(path)
        compared += 1
    assert compared > 20


def test_max_predictions_changes_neither_loss_nor_gradients(case):
    most = int((case.batch["labels"] != -100).sum(axis=1).max())
    config = case.config.copy_and_resolve_references()
    config.model.max_predictions = most
    loss, grads = case.loss_and_grads(build_model(config))
    np.testing.assert_allclose(loss, case.result[0], rtol=1e-6)
    for (path, actual), expected in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(case.result[1]), strict=True
    ):
        if not is_key_bias(path):
            assert deviation(actual, expected) < BACKWARD, jax.tree_util.keystr(path)


def test_loss_is_summed_and_counted_per_sequence(case):
    apply = jax.jit(case.model.apply, static_argnames="method")
    total_B, count_B = apply({"params": case.params}, case.batch, method="loss")
    labels = np.asarray(case.batch["labels"])
    np.testing.assert_array_equal(count_B, (labels != -100).sum(axis=1))
    logits = np.asarray(apply({"params": case.params}, *case.inputs()), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected = -(picked * (labels != -100)).sum(axis=1)
    np.testing.assert_allclose(total_B, expected, rtol=1e-5)
