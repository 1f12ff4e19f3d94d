"""Golden arrays of the original implementation, and its options and names in ours."""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from quantizable_flax import default_config

TESTS = Path(__file__).parent
FULL = TESTS.parent.parent / "shared" / "goldens" / "open"
SUBSET = TESTS / "goldens"
TEXT_SIZES = {
    "hidden_size": "hidden_size",
    "heads": "num_heads",
    "layers": "num_layers",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}
VIT_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "intermediate_size",
    "num_channels": "channels",
    "num_labels": "num_classes",
    "layer_norm_eps": "layer_norm_eps",
}


class Golden(dict):
    """The arrays of one file by key, and its `config`."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            super().__init__({key: file[key] for key in file.files if key != "config"})
            self.config = json.loads(str(file["config"]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the arrays below `prefix/`, under the rest of their keys."""
        start = prefix + "/"
        return {key.removeprefix(start): self[key] for key in self if key.startswith(start)}


def golden_folder() -> Path:
    """Returns where goldens are: $GOLDENS, else the full set, else the committed subset."""
    if "GOLDENS" in os.environ:
        return Path(os.environ["GOLDENS"])
    return FULL if FULL.is_dir() else SUBSET


@functools.cache
def golden(name: str) -> Golden:
    """Loads `name`.npz; cached, so nobody may write into its arrays."""
    return Golden(golden_folder() / f"{name}.npz")


def golden_names(pattern: str) -> list[str]:
    """Returns the names of the files at hand that match the pattern, sorted."""
    return sorted(path.stem for path in golden_folder().glob(f"{pattern}.npz"))


def attention_options(original: dict[str, Any], head_size: int) -> dict[str, Any]:
    """Translates the original's attention options into keys of `config.model.attention`."""
    ours: dict[str, Any] = {}
    if "softmax" in original:
        gamma, eta = re.fullmatch(r"clipped\((.*):(.*)\)", original["softmax"]).groups()
        ours |= {"softmax": "clipped", "gamma": float(gamma), "zeta": float(eta)}
    if "alpha" in original:
        ours |= {"softmax": "clipped", "alpha": original["alpha"]}
    if "gate" not in original:
        return ours
    ours |= {"gate_pi_init": original["init"], "gate_finetune": "fine_tuning" in original}
    if original["gate"] == "unconditional_per_head":
        return ours | {"gate": "unconditional"}
    if original.get("attn_gate_linear_all_features"):
        return ours | {"gate": "all_heads_linear"}  # per token there, whatever `gate` says
    per_head = original["gate"] == "conditional_per_head"
    ours |= {"gate": "linear", "gate_pooling": "all" if per_head else "none"}
    if original.get("attn_gate_mlp"):
        ours |= {"gate": "mlp", "gate_hidden": head_size // 4}
    if original.get("attn_gate_mlp2"):
        ours |= {"gate": "mlp", "gate_hidden": head_size}
    return ours


def bert_config(original: dict[str, Any]) -> ConfigDict:
    """Returns our configuration of a golden BERT; `original` is the file's config."""
    config = default_config("bert")
    _set_text_sizes(config, original)
    return config


def opt_config(original: dict[str, Any]) -> ConfigDict:
    """Returns our configuration of a golden OPT; `original` is the file's config."""
    config = default_config("opt")
    _set_text_sizes(config, original)
    config.model.pre_layer_norm = original.get("pre_ln", True)
    if "proj" in original:
        config.model.embed_size = original["proj"]
    return config


def _set_text_sizes(config: ConfigDict, original: dict[str, Any]) -> None:
    for theirs, ours in TEXT_SIZES.items():
        config.model[ours] = original[theirs]
    config.model.max_position_embeddings = 64
    config.model.pad_token_id = original["pad_id"]
    config.data.seq_len = original["seq"]
    head_size = original["hidden_size"] // original["heads"]
    config.model.attention.update(attention_options(original["attention"], head_size))


def vit_config(original: dict[str, Any]) -> ConfigDict:
    """Returns our configuration of a golden ViT; `original` is the file's config."""
    config = default_config("vit")
    for theirs, ours in VIT_SIZES.items():
        config.model[ours] = original[theirs]
    attention = config.model.attention
    if original["attention"] == "clipped":
        stretch = {key: original[key] for key in ("gamma", "zeta")}
        attention.update({"softmax": "clipped", **stretch})
    if original["attention"] == "gated":
        assert original["gate"] == "linear per token"
        attention.update({"gate": "linear", "gate_pi_init": original["gate_init"]})
    return config


CONFIGS = {"bert": bert_config, "opt": opt_config, "vit": vit_config}
INPUTS = {
    "bert": ("input_ids", "attention_mask", "token_type_ids"),
    "opt": ("input_ids", "attention_mask"),
    "vit": ("images",),
}


def config_of(file: Golden) -> ConfigDict:
    """Returns our configuration of the golden model of any family."""
    config = CONFIGS[file.config["arch"]](file.config)
    config.model.attention.blind_queries = "uniform"  # as everywhere in the original
    return config


def deviation(actual: jax.Array, expected: np.ndarray) -> float:
    """Returns the largest difference, as a share of the largest expected magnitude."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def pairs(actual, expected) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (path, leaf, leaf) of two trees of the same structure."""
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(x), np.asarray(y)


def is_key_bias(path: str) -> bool:
    """Whether the exact gradient is 0: a key bias moves all scores of a row alike.

    Both sides hold rounding noise then, which only its absolute size can judge.
    """
    return path.endswith("key/bias")


def batch_of(file: Golden, index: int | None = None) -> dict[str, jax.Array]:
    """Returns the golden batch `in/*`, or the index-th of several stacked ones."""
    arrays = file.group("in")
    if "pixel_values" in arrays:  # [B, C, H, W] there
        arrays["images"] = arrays.pop("pixel_values").transpose(0, 2, 3, 1)
    return {key: jnp.asarray(x if index is None else x[index]) for key, x in arrays.items()}
