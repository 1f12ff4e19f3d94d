"""State dicts as transformers 5 and training frameworks write them: names, ties, heads."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from quantizable_flax import UserError, build_model, default_config
from quantizable_flax.interop import from_state_dict
from tests.helpers import SUBSET, Golden
from tests.interop.test_vit import timm_names
from tests.make_pretrained_goldens import drawn

FAMILIES = ("bert", "opt", "vit")
WORD = "bert.embeddings.word_embeddings.weight"
TOKENS = "model.decoder.embed_tokens.weight"
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 40, "max_position_embeddings": 12}
IMAGES = {"image_size": 8, "patch_size": 4, "num_classes": 5, "layer_norm_eps": 1e-12}
FILE = Golden(SUBSET / "state_dicts.npz")


@functools.cache
def expected(family: str):
    """(config, weights, aliases, params) under the names of transformers 5, to be copied."""
    config = default_config(family)
    config.model.update({**SIZES, **(IMAGES if family == "vit" else TEXT)})
    tensors = FILE.config["tensors"][family]
    weights = drawn(tensors["stored"])
    return config, weights, tensors["aliases"], from_state_dict(weights, config)


def case(family: str) -> tuple[ConfigDict, dict[str, np.ndarray]]:
    """(config, weights with all aliases); both may be changed."""
    config, weights, aliases, _ = expected(family)
    tied = {alias: weights[name] for alias, name in aliases.items()}
    return config.copy_and_resolve_references(), {**weights, **tied}


def assert_same(weights, config, family):
    jax.tree.map(
        np.testing.assert_array_equal, from_state_dict(weights, config), expected(family)[3]
    )


def renamed(weights, pattern: str, replacement: str):
    return {re.sub(pattern, replacement, name): w for name, w in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_5(family):
    config, _, _, params = expected(family)
    if family == "vit":
        inputs = (FILE["pixel_values"].transpose(0, 2, 3, 1),)
    else:
        inputs = (FILE["input_ids"], FILE["attention_mask"])
    actual = build_model(config).apply({"params": params}, *map(jnp.asarray, inputs))
    # Float32 on both sides: some 1e-6 of logits of size 3.
    np.testing.assert_allclose(actual, FILE[f"{family}/logits"], rtol=0, atol=1e-5)


PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model._orig_mod.",
    "_orig_mod.module.model.net.",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_left_away(family, prefix):
    config, weights = case(family)
    assert_same({prefix + name: w for name, w in weights.items()}, config, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_of_layers_are_left_away(family):
    config, weights = case(family)
    compiled = renamed(weights, r"(layers?\.\d+\.)", r"\1_orig_mod.")
    checkpointed = renamed(compiled, r"(\.\d+\.)", r"\1_checkpoint_wrapped_module.")
    assert compiled.keys() != weights.keys()
    assert_same(checkpointed, config, family)


@pytest.mark.parametrize("root", ["decoder.", "", "model.model.decoder.", "module.decoder."])
def test_opt_without_its_head(root):
    config, weights = case("opt")
    del weights["lm_head.weight"]
    assert_same(renamed(weights, r"^model\.decoder\.", root), config, "opt")


def as_transformers_4(weights):
    """The same ViT under the names of release 4, as 5 still saves it."""
    for pattern, replacement in (
        (r"vit\.layers", "vit.encoder.layer"),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"attention\.(attention\.)?alpha", "attention.attention.alpha"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ):
        weights = renamed(weights, pattern, replacement)
    return weights


@pytest.mark.parametrize("gate", ["attention.attention.alpha", "attention.alpha"])
def test_vit_of_both_releases_is_the_same(gate):
    config, weights = case("vit")
    config.model.attention.gate = "linear"
    for layer, head in np.ndindex(2, 2):
        name = f"vit.layers.{layer}.{gate}.{head}"
        weights[f"{name}.weight"] = np.full((1, 8), 1.0 + layer)
        weights[f"{name}.bias"] = np.full((1,), 1.0 * head)
    modern = from_state_dict(weights, config)
    np.testing.assert_array_equal(modern["layer_1"]["attention"]["gate"]["bias"], [0.0, 1.0])
    weights = as_transformers_4(weights)
    assert "vit.encoder.layer.1.attention.attention.query.weight" in weights
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(weights, config), modern)


def timm_case():
    config, weights = case("vit")
    return config, timm_names(as_transformers_4(weights), config.model.num_layers)


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "model.backbone."])
def test_timm_under_prefixes(prefix):
    config, weights = timm_case()
    assert_same({prefix + name: w for name, w in weights.items()}, config, "vit")


@pytest.mark.parametrize(
    "name",
    [
        "head_dist.weight",
        "fc_norm.weight",
        "pre_logits.fc.weight",
        "blocks.0.ls1.gamma",
        "norm_pre.weight",
        "blocks.1.attn.q_norm.weight",
        "extra.vit.pooler.dense.weight",
    ],
)
def test_parts_of_other_timm_models_have_no_place(name):
    config, weights = timm_case()
    weights[name] = np.zeros(16, np.float32)
    with pytest.raises(UserError, match=f"1 tensors have no place.*'{name}'"):
        from_state_dict(weights, config)


TIES = [
    ("bert", "cls.predictions.decoder.weight", WORD),
    ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("opt", "lm_head.weight", TOKENS),
]


@pytest.mark.parametrize(("family", "alias", "name"), TIES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.model."])
def test_an_untied_head_is_refused(family, alias, name, prefix):
    config, weights = case(family)
    weights[alias] = weights[alias].copy()
    weights[alias].flat[-1] += 1e-3
    weights = {prefix + key: w for key, w in weights.items()}
    both = f"{prefix}{name}' and '{prefix}{alias}' should be equal.* differ in 1 of"
    with pytest.raises(UserError, match=both):
        from_state_dict(weights, config)


@pytest.mark.parametrize(("family", "alias", "name"), TIES)
def test_a_tied_tensor_may_be_stored_under_either_name(family, alias, name):
    config, weights = case(family)
    whole = weights.copy()
    del weights[name]
    assert_same(weights, config, family)
    weights[alias] = weights[alias][:-1]
    with pytest.raises(UserError, match=f"'{alias}' should have shape"):
        from_state_dict(weights, config)
    with pytest.raises(UserError, match=f"'{alias}' should have shape"):
        from_state_dict({**whole, alias: weights[alias]}, config)
    del weights[alias]
    with pytest.raises(UserError, match=f"no tensor '{name}'"):
        from_state_dict(weights, config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_ties_hold_in_every_precision(dtype):
    config, weights = case("opt")
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    weights["lm_head.weight"][0, 0] = weights[TOKENS][0, 0] = np.nan  # is not equal to itself
    from_state_dict(weights, config)
    weights["lm_head.weight"][3, 0] *= 1.5
    with pytest.raises(UserError, match=r"embed_tokens.weight' and 'lm_head.weight'"):
        from_state_dict(weights, config)


def test_positions_that_do_not_count_from_0_are_refused():
    config, weights = case("bert")
    name = "bert.embeddings.position_ids"
    assert_same({**weights, name: np.arange(12)[None]}, config, "bert")
    with pytest.raises(UserError, match=f"'{name}' should count positions from 0.*2, 3, 4, 5"):
        from_state_dict({**weights, name: np.arange(2, 14)}, config)
    with pytest.raises(UserError, match=r"1 tensors have no place.*'other\.position_ids'"):
        from_state_dict({**weights, "other.position_ids": np.arange(12)}, config)


def test_encoders_alone_have_no_head():
    config, weights = case("bert")
    bare = {n.removeprefix("bert."): w for n, w in weights.items() if n.startswith("bert.")}
    with pytest.raises(UserError, match=r"no tensors cls.predictions.\*.*save BertForMaskedLM"):
        from_state_dict(bare, config)
    config, weights = case("vit")
    bare = {n.removeprefix("vit."): w for n, w in weights.items() if n.startswith("vit.")}
    with pytest.raises(UserError, match=r"no tensors classifier.\*.*ViTForImageClassification"):
        from_state_dict(bare, config)


def test_two_models_in_one_state_dict_are_refused():
    config, weights = case("bert")
    twice = {f"{start}.{name}": w for name, w in weights.items() for start in ("model", "ema")}
    with pytest.raises(UserError, match=r"several models, found 'ema\.bert.*'model\.bert"):
        from_state_dict(twice, config)
    with pytest.raises(UserError, match=f"'{WORD}' and 'module.{WORD}' are the same"):
        from_state_dict({**weights, f"module.{WORD}": weights[WORD]}, config)


def test_codes_are_no_weights():
    config, weights = case("opt")
    name = "model.decoder.layers.0.fc1.weight"
    weights[name] = np.ones((32, 16), np.int8)
    with pytest.raises(UserError, match=f"'{name}' should hold floating-point.*int8"):
        from_state_dict(weights, config)
