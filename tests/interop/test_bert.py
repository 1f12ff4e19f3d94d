"""Reading weights under their original names: what is refused and what is let pass."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from quantizable_flax import UserError, build_model
from quantizable_flax.interop import from_state_dict
from tests.helpers import bert_config, golden

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
GATE = "bert.encoder.layer.0.attention.self.alpha.0.weight"


@pytest.fixture
def original():
    """(weights, config) of a small gated model; both may be changed."""
    file = golden("train_bert_gated")
    return file.group("w0"), bert_config(file.config)


def test_tree_is_that_of_the_model(original):
    weights, config = original
    ids = np.zeros((1, 4), np.int32)
    fresh = jax.eval_shape(build_model(config).init, jax.random.key(0), ids)["params"]
    expected, actual = nn.meta.unbox(fresh), from_state_dict(weights, config)
    assert jax.tree.map(np.shape, actual) == jax.tree.map(lambda x: x.shape, expected)


def test_linear_weights_are_transposed(original):
    weights, config = original
    params = from_state_dict(weights, config)
    kernel = params["layer_0"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel, weights[QUERY].T)


def test_missing_tensor_is_named(original):
    weights, config = original
    del weights[QUERY]
    with pytest.raises(UserError, match=f"no tensor '{QUERY}'.*another architecture"):
        from_state_dict(weights, config)


def test_wrong_shape_is_named(original):
    weights, config = original
    weights[QUERY] = weights[QUERY][:3]
    with pytest.raises(UserError, match=rf"{QUERY}' should have shape \(32, 32\).*\(3, 32\)"):
        from_state_dict(weights, config)


def test_wrong_sizes_in_the_configuration_are_found(original):
    weights, config = original
    config.model.vocab_size = 100
    with pytest.raises(UserError, match=r"word_embeddings.weight' should have shape \(100, 32\)"):
        from_state_dict(weights, config)


def test_gates_without_a_gate_in_the_configuration_are_left_over(original):
    weights, config = original
    config.model.attention.gate = "none"
    with pytest.raises(UserError, match=f"8 tensors have no place.*'{GATE}'.*attention.gate"):
        from_state_dict(weights, config)


def test_a_gate_in_the_configuration_without_weights_is_missing(original):
    weights, config = original
    config.model.attention.gate = "all_heads_linear"
    with pytest.raises(UserError, match=r"no tensor 'bert.encoder.layer.0.attention.self.alpha"):
        from_state_dict(weights, config)


def test_layers_beyond_the_configuration_are_left_over(original):
    weights, config = original
    extra = QUERY.replace("layer.0", "layer.1")
    weights[extra] = weights[QUERY]
    with pytest.raises(UserError, match=f"1 tensors have no place.*'{extra}'.*num_layers"):
        from_state_dict(weights, config)


def test_tied_aliases_and_unused_parts_are_accepted(original):
    weights, config = original
    expected = from_state_dict(weights, config)
    aliases = golden("train_bert_gated").config["tied_aliases"]
    assert aliases
    extra = {alias: weights[stored] for alias, stored in aliases.items()}
    extra["bert.embeddings.position_ids"] = np.arange(64)
    extra["bert.pooler.dense.weight"] = np.zeros((32, 32))
    extra["cls.seq_relationship.bias"] = np.zeros(2)
    actual = from_state_dict({**weights, **extra}, config)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_unknown_model_is_named(original):
    weights, config = original
    config.model.name = "bret"
    with pytest.raises(UserError, match=r"found 'bret'.*did you mean 'bert'"):
        from_state_dict(weights, config)


def test_half_precision_weights_are_read_as_float32(original):
    weights, config = original
    params = from_state_dict({k: w.astype(np.float16) for k, w in weights.items()}, config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
