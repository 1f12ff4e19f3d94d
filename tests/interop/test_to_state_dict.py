"""Writing weights under their original names: what transformers and timm would load."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from quantizable_flax import UserError, build_model, default_config, from_state_dict, to_state_dict
from quantizable_flax.interop.engine import shapes_of
from quantizable_flax.models.build import FAMILIES, Family
from tests.helpers import config_of, golden, golden_names
from tests.interop.test_state_dicts import IMAGES, SIZES, TEXT, as_transformers_4, case, timm_case

GATES = ("none", "linear", "mlp", "all_heads_linear", "unconditional")
FILES = golden_names("model_*") + golden_names("train_*")


def small_config(family: str, gate: str = "none", **changes):
    config = default_config(family)
    config.model.update({**SIZES, **(IMAGES if family == "vit" else TEXT), **changes})
    config.model.attention.gate = gate
    return config


def drawn(config):
    """Parameters of which no two numbers are equal, by path."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(build_model(config))
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype("float32")}


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_names_and_shapes_are_those_of_transformers_5(family):
    config, weights = case(family)
    assert_same(to_state_dict(from_state_dict(weights, config), config), weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_safetensors_holds_them(family, tmp_path):
    config = small_config(family, "linear")
    params = drawn(config)
    save_file(to_state_dict(params, config), tmp_path / "model.safetensors")
    assert_same(from_state_dict(load_file(tmp_path / "model.safetensors"), config), params)


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_those_of_the_original(name):
    file = golden(name)
    weights = file.group("w") or file.group("w0")
    config = config_of(file)
    source = "transformers 4" if config.model.name == "vit" else "transformers"
    actual = to_state_dict(from_state_dict(weights, config), config, source=source)
    aliases = file.config.get("tied_aliases", {})
    known = {alias: weights[stored] for alias, stored in aliases.items()}
    ties = {alias for alias in actual if alias.startswith(("lm_head", "cls.predictions.decoder"))}
    assert set(aliases) <= ties
    assert actual.keys() - ties == weights.keys()
    assert_same({name: actual[name] for name in weights.keys() | aliases.keys()}, weights | known)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(family, gate):
    config = small_config(family, gate)
    params = drawn(config)
    tensors = to_state_dict(jax.tree.map(jnp.asarray, params), config)
    assert_same(from_state_dict(tensors, config), params)
    gates = [re.sub(r"^.*alpha", "alpha", name) for name in tensors if "alpha" in name]
    assert len(gates) == 2 * {"none": 0, "linear": 4, "mlp": 8}.get(gate, len(set(gates)))


@pytest.mark.parametrize(
    "config",
    [
        small_config("opt", pre_layer_norm=False, embed_size=12),
        small_config("opt", embed_size=12),
        small_config("vit", num_registers=2, patch_layer_norm=True),
        small_config("bert", "mlp", max_predictions=4, pad_token_id=0),
    ],
    ids=["post-LN", "projected", "registers", "bert"],
)
def test_options_of_the_families_are_written(config):
    params = drawn(config)
    tensors = to_state_dict(params, config)
    assert_same(from_state_dict(tensors, config), params)
    if config.model.name == "opt":
        assert tensors["lm_head.weight"].shape == (40, 12)
        assert tensors["model.decoder.project_in.weight"].shape == (16, 12)
    if config.model.name == "vit":
        assert tensors["vit.embeddings.register_tokens"].shape == (1, 2, 16)


def test_a_tied_head_is_one_array_under_both_names():
    config = small_config("bert")
    tensors = to_state_dict(drawn(config), config)
    word = tensors["bert.embeddings.word_embeddings.weight"]
    assert tensors["cls.predictions.decoder.weight"] is word
    assert tensors["cls.predictions.decoder.bias"] is tensors["cls.predictions.bias"]


def test_vit_under_the_names_of_other_sources():
    config, weights = case("vit")
    params = from_state_dict(weights, config)
    older = to_state_dict(params, config, source="transformers 4")
    assert_same(older, as_transformers_4(weights))
    timm = to_state_dict(params, config, source="timm")
    assert_same(timm, timm_case()[1])
    assert_same(from_state_dict(timm, config), params)


def test_what_a_source_lacks_is_refused():
    config = small_config("vit", "linear")
    with pytest.raises(UserError, match=r"timm's names have no gates.*gate='linear'"):
        to_state_dict(drawn(config), config, source="timm")
    config = small_config("vit", num_registers=2)
    with pytest.raises(UserError, match=r"timm's models with registers.*num_registers=2"):
        to_state_dict(drawn(config), config, source="timm")
    with pytest.raises(UserError, match=r"source must be one of.*found 'timn'.*mean 'timm'"):
        to_state_dict(drawn(config), config, source="timn")


@pytest.mark.parametrize(
    ("key", "value", "parameter"),
    [
        ("gate", "value", "gate/bias"),  # the shapes of the linear one's, and another meaning
        ("gate", "elementwise", "gate/bias"),
        ("qk_norm", True, "key_norm/scale"),
    ],
)
def test_attention_without_a_name_elsewhere_is_refused(key, value, parameter):
    config = small_config("bert")
    config.model.attention[key] = value
    with pytest.raises(UserError, match=f"'layer_0/attention/{parameter}' has no name in other"):
        to_state_dict(drawn(config), config)


def test_parameters_of_another_model_are_refused():
    config = small_config("bert")
    params = drawn(config)
    scale = {"attention_residual_scale": {"scale": np.ones(16)}}
    smoothed = {**params, "layer_0": {**params["layer_0"], **scale}}
    with pytest.raises(UserError, match=r"'layer_0/attention_residual_scale/scale' has no place"):
        to_state_dict(smoothed, config)
    with pytest.raises(UserError, match=r"'layer_1/ffn_in/bias' should have .*found none"):
        to_state_dict({**params, "layer_1": params["layer_1"] | {"ffn_in": {}}}, config)
    config.model.intermediate_size = 8
    with pytest.raises(UserError, match=r"ffn_in/bias' should have shape \(8,\).*found \(32,\)"):
        to_state_dict(params, config)


def test_boxed_parameters_are_written_too():
    config = small_config("opt")
    model = build_model(config)
    boxed = model.init(jax.random.key(0), model.example_batch(), method="loss")["params"]
    tensors = to_state_dict(boxed, config)
    assert_same(from_state_dict(tensors, config), jax.tree.map(np.asarray, nn.meta.unbox(boxed)))


@pytest.mark.parametrize("named", [False, True])
def test_a_family_without_names_says_so(monkeypatch, named):
    bert = FAMILIES["bert"]
    table = dataclasses.replace(bert.config().weight_names[0], names={})
    other = type("Other", (bert.config,), {"weight_names": (table,) if named else ()})
    monkeypatch.setitem(FAMILIES, "other", Family(bert.module, other))
    config = small_config("bert")
    params = drawn(config)
    tensors = to_state_dict(params, config)
    config.model.name = "other"
    sentence = (
        "parameter '.*' has no name" if named else "weights of model.name=other have no names"
    )
    with pytest.raises(UserError, match=sentence):
        from_state_dict(tensors, config)
    with pytest.raises(UserError, match=sentence):
        to_state_dict(params, config)
