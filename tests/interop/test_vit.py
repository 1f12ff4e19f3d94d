"""Reading ViT's weights under Hugging Face's names and under timm's."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from quantizable_flax import UserError, build_model
from quantizable_flax.interop import from_state_dict
from quantizable_flax.models.vit import patches
from tests.helpers import golden, vit_config

PATCH = "vit.embeddings.patch_embeddings.projection.weight"


@pytest.fixture
def original():
    """(weights, config) of a gated model under Hugging Face's names; both may be changed."""
    file = golden("model_vit_gated")
    return file.group("w"), vit_config(file.config)


def ungated(weights, config):
    config.model.attention.gate = "none"
    return {name: w for name, w in weights.items() if ".alpha." not in name}, config


def timm_names(weights: dict, layers: int) -> dict:
    """The same tensors as timm stores them: one matrix for queries, keys and values."""
    start = "vit.embeddings."
    renamed = {
        "cls_token": weights[f"{start}cls_token"],
        "pos_embed": weights[f"{start}position_embeddings"],
    }
    pairs = [
        ("patch_embed.proj", f"{start}patch_embeddings.projection"),
        ("norm", "vit.layernorm"),
        ("head", "classifier"),
    ]
    for i in range(layers):
        theirs, block = f"vit.encoder.layer.{i}.", f"blocks.{i}."
        pairs += [
            (f"{block}attn.proj", f"{theirs}attention.output.dense"),
            (f"{block}norm1", f"{theirs}layernorm_before"),
            (f"{block}norm2", f"{theirs}layernorm_after"),
            (f"{block}mlp.fc1", f"{theirs}intermediate.dense"),
            (f"{block}mlp.fc2", f"{theirs}output.dense"),
        ]
        for end in ("weight", "bias"):
            parts = [f"{theirs}attention.attention.{x}.{end}" for x in ("query", "key", "value")]
            fused = np.concatenate([weights[part] for part in parts])
            renamed[f"{block}attn.qkv.{end}"] = fused
    for timm, hugging_face in pairs:
        for end in ("weight", "bias"):
            renamed[f"{timm}.{end}"] = weights[f"{hugging_face}.{end}"]
    return renamed


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def fresh_shapes(config):
    model = build_model(config)
    images = model.example_batch()["images"]
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda x: x.shape, nn.meta.unbox(params))


def test_tree_is_that_of_the_model(original):
    weights, config = original
    actual = from_state_dict(weights, config)
    assert jax.tree.map(np.shape, actual) == fresh_shapes(config)
    config.model.update({"num_registers": 2, "patch_layer_norm": True})
    start = "vit.embeddings."
    weights[f"{start}register_tokens"] = np.ones((1, 2, 64))
    weights |= {f"{start}layernorm.{end}": np.ones(64) for end in ("weight", "bias")}
    assert jax.tree.map(np.shape, from_state_dict(weights, config)) == fresh_shapes(config)


def test_patch_kernel_is_the_convolution(original):
    weights, config = original
    embedding = from_state_dict(weights, config)["embeddings"]["patch_embedding"]
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    actual = np.asarray(patches(images, 8), np.float64) @ embedding["kernel"] + embedding["bias"]
    # By the definition of a convolution with stride 8, patch by patch, row by row.
    kernel = weights[PATCH].astype(np.float64)  # [D, C, P, P]
    expected = [
        np.einsum("bijc,dcij->bd", images[:, y : y + 8, x : x + 8], kernel)
        for y in range(0, 32, 8)
        for x in range(0, 32, 8)
    ]
    expected = np.stack(expected, axis=1) + weights[PATCH.replace("weight", "bias")]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_timm_names_give_the_same_parameters(original):
    weights, config = ungated(*original)
    expected = from_state_dict(weights, config)
    renamed = timm_names(weights, config.model.num_layers)
    assert_same(from_state_dict(renamed, config), expected)
    config.model.patch_layer_norm = True
    for end, value in (("weight", np.full(64, 2.0)), ("bias", np.full(64, 3.0))):
        weights[f"vit.embeddings.layernorm.{end}"] = renamed[f"patch_embed.norm.{end}"] = value
    expected = from_state_dict(weights, config)
    assert "patch_layer_norm" in expected["embeddings"]
    assert_same(from_state_dict(renamed, config), expected)


def test_unused_pooler_is_accepted(original):
    weights, config = original
    pooler = {"vit.pooler.dense.weight": np.zeros((64, 64)), "vit.pooler.dense.bias": np.zeros(64)}
    assert_same(from_state_dict({**weights, **pooler}, config), from_state_dict(weights, config))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_classes": 10}, r"classifier.weight' should have shape \(10, 64\).*\(7, 64\)"),
        ({"patch_size": 16}, r"should have shape \(64, 3, 16, 16\).*\(64, 3, 8, 8\)"),
        ({"image_size": 48}, r"position_embeddings' should have shape \(1, 37, 64\).*\(1, 17, 64"),
        ({"num_registers": 2}, "no tensor 'vit.embeddings.register_tokens'"),
        ({"patch_layer_norm": True}, "no tensor 'vit.embeddings.layernorm.weight'"),
        ({"num_layers": 2}, r"\d+ tensors have no place.*'vit.encoder.layer.2"),
        ({"attention.gate": "none"}, r"24 tensors have no place.*attention.attention.alpha"),
    ],
)
def test_configuration_of_another_model_is_found(original, changes, sentence):
    weights, config = original
    with config.unlocked():
        config.model.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        from_state_dict(weights, config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("reg_token", "1 tensors have no place.*'reg_token'"),
        ("blocks.3.attn.qkv.weight", "1 tensors have no place.*'blocks.3.attn.qkv.weight'"),
    ],
)
def test_left_over_timm_tensors_are_named(original, change, sentence):
    weights, config = ungated(*original)
    renamed = timm_names(weights, config.model.num_layers)
    with pytest.raises(UserError, match=sentence):
        from_state_dict({**renamed, change: np.zeros((1, 2, 64))}, config)


def test_timm_weights_fill_neither_gates_nor_registers(original):
    weights, config = original
    renamed = timm_names(weights, config.model.num_layers)
    with pytest.raises(UserError, match=r"timm's names have no gates.*gate='linear'"):
        from_state_dict(renamed, config)
    config.model.attention.gate, config.model.num_registers = "none", 2
    renamed["reg_token"] = np.ones((1, 2, 64))
    with pytest.raises(UserError, match=r"timm's models with registers.*num_registers=2"):
        from_state_dict(renamed, config)
