"""Reading OPT's weights under their original names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from quantizable_flax import UserError, build_model
from quantizable_flax.interop import from_state_dict
from tests.helpers import golden, opt_config

START = "model.decoder."
QUERY = f"{START}layers.0.self_attn.q_proj.weight"


@pytest.fixture
def original():
    """(weights, config) of a small gated model; both may be changed."""
    file = golden("train_opt_gated")
    return file.group("w0"), opt_config(file.config)


def narrow(weights, config):
    """The same as a post-LN model with word embeddings of width 24 under their projections."""
    rng = np.random.default_rng(0)
    weights[f"{START}embed_tokens.weight"] = weights[f"{START}embed_tokens.weight"][:, :24]
    for name, shape in (("project_in", (32, 24)), ("project_out", (24, 32))):
        weights[f"{START}{name}.weight"] = rng.normal(size=shape).astype(np.float32)
    for end in ("weight", "bias"):
        del weights[f"{START}final_layer_norm.{end}"]
    config.model.update({"pre_layer_norm": False, "embed_size": 24})
    return weights, config


@pytest.mark.parametrize("change", [lambda *pair: pair, narrow], ids=["pre-LN", "post-LN"])
def test_tree_is_that_of_the_model(original, change):
    weights, config = change(*original)
    model = build_model(config)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    expected, actual = nn.meta.unbox(fresh), from_state_dict(weights, config)
    assert jax.tree.map(np.shape, actual) == jax.tree.map(lambda x: x.shape, expected)


def test_linear_weights_are_transposed(original):
    weights, config = narrow(*original)
    params = from_state_dict(weights, config)
    for ours, theirs in (
        (params["layer_0"]["attention"]["query"], "layers.0.self_attn.q_proj"),
        (params["layer_0"]["attention"]["output"], "layers.0.self_attn.out_proj"),
        (params["layer_0"]["ffn_in"], "layers.0.fc1"),
        (params["embeddings"]["project_in"], "project_in"),
        (params["project_out"], "project_out"),
    ):
        np.testing.assert_array_equal(ours["kernel"], weights[f"{START}{theirs}.weight"].T)


def test_tied_head_is_accepted_and_not_used(original):
    weights, config = original
    aliases = golden("train_opt_gated").config["tied_aliases"]
    assert aliases == {"lm_head.weight": f"{START}embed_tokens.weight"}
    expected = from_state_dict(weights, config)
    extra = {alias: weights[stored] for alias, stored in aliases.items()}
    actual = from_state_dict({**weights, **extra}, config)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 100}, r"embed_tokens.weight' should have shape \(100, 32\)"),
        # Two rows more than positions: OPT counts from 2.
        ({"max_position_embeddings": 62}, r"embed_positions.*\(64, 32\).*found \(66, 32\)"),
        ({"embed_size": 24}, r"embed_tokens.weight' should have shape \(200, 24\).*\(200, 32\)"),
        ({"intermediate_size": 32}, r"fc1.weight' should have shape \(32, 32\)"),
        ({"pre_layer_norm": False}, "2 tensors have no place.*'model.decoder.final_layer_norm"),
        ({"num_layers": 2}, r"no tensor 'model.decoder.layers.1"),
        ({"attention.gate": "none"}, r"8 tensors have no place.*self_attn.alpha"),
        ({"attention.gate": "all_heads_linear"}, r"no tensor '.*self_attn.alpha.weight"),
    ],
)
def test_configuration_of_another_model_is_found(original, changes, sentence):
    weights, config = original
    with config.unlocked():
        config.model.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        from_state_dict(weights, config)


def test_missing_and_wrong_tensors_are_named(original):
    weights, config = original
    whole = weights[QUERY]
    weights[QUERY] = whole[:3]
    with pytest.raises(UserError, match=rf"{QUERY}' should have shape \(32, 32\).*\(3, 32\)"):
        from_state_dict(weights, config)
    del weights[QUERY]
    with pytest.raises(UserError, match=f"no tensor '{QUERY}'"):
        from_state_dict(weights, config)
    weights[QUERY], weights[QUERY.replace("layers.0", "layers.1")] = whole, whole
    with pytest.raises(UserError, match=r"1 tensors have no place.*layers.1.self_attn.q_proj"):
        from_state_dict(weights, config)
