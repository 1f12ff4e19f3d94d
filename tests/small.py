"""Models of every family that compile in a second, for tests of properties."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from quantizable_flax import build_model, default_config
from quantizable_flax.models.shapes import boxed_shapes

TEXT = {"vocab_size": 96, "max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**TEXT, "pad_token_id": 0},
    "opt": {**TEXT, "pad_token_id": 1},
    "vit": {"image_size": 16, "patch_size": 4, "channels": 3, "num_classes": 5},
}
KIN = {"roberta": TEXT, "distilbert": TEXT}  # the module of BERT by other configurations
SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "intermediate_size": 64}


def small_config(family: str, attention: dict[str, Any] | None = None, **model) -> ConfigDict:
    """A configuration with some keys of `model` and `model.attention` changed."""
    config = default_config(family)
    config.model.update({**SIZES, **(FAMILIES | KIN)[family], **model})
    config.model.attention.update(attention or {})
    if family != "vit":
        config.data.seq_len = 12
    return config


def small_batch(family: str) -> dict[str, jax.Array]:
    """Three examples; tokens without padding, or uint8 images."""
    key = jax.random.key(0)
    if family == "vit":
        images = jax.random.randint(key, (3, 16, 16, 3), 0, 256).astype(jnp.uint8)
        return {"images": images, "labels": jnp.arange(3)}
    ids = jax.random.randint(key, (3, 12), 2, 96)
    labels = jnp.where(jnp.arange(12) % 4 == 0, ids, -100) if family == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def small_model(
    family: str, attention: dict[str, Any] | None = None, *, spread: float = 0.2, **model
):
    """(module, params), all of them random; weights so large that attention is not uniform."""
    built = build_model(small_config(family, attention, **model))
    shapes = nn.meta.unbox(boxed_shapes(built))
    rng = np.random.default_rng(1)

    def fill(path, x):
        values = rng.normal(size=x.shape)
        kind = path[-1].key
        if kind == "scale":
            values = 1.0 + 0.1 * values
        elif kind != "logit":  # of a gate
            values *= 0.1 if kind.endswith("bias") else spread
        return jnp.asarray(values, jnp.float32)

    return built, jax.tree_util.tree_map_with_path(fill, shapes)
