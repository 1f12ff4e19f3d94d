"""Folders of every architecture as transformers saves them, with weights that are drawn again."""

import json
from pathlib import Path

import jax.numpy as jnp
from safetensors.numpy import save_file

from tests.helpers import SUBSET, Golden
from tests.make_pretrained_goldens import drawn, inputs

FILE = Golden(SUBSET / "pretrained.npz")
ARCHITECTURES = tuple(FILE.config)
OUTPUTS = ("logits", "prediction_logits", "last_hidden_state")


def weights(name: str):
    return drawn(FILE.config[name]["shapes"])


def config_json(name: str) -> dict:
    return json.loads(json.dumps(FILE.config[name]["config"]))


def write(folder: Path, config: dict, tensors: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def saved(folder: Path, name: str) -> str:
    """The folder with a model of that architecture."""
    return write(folder, config_json(name), weights(name))


def arguments(name: str):
    """What the model computed the file's outputs of, as our models take it."""
    given = inputs()
    if name.startswith(("ViT", "DeiT")):
        return (jnp.asarray(given["pixel_values"].transpose(0, 2, 3, 1)),)
    return tuple(jnp.asarray(given[key], jnp.int32) for key in ("input_ids", "attention_mask"))


def expected(name: str):
    """Logits, or the last hidden states of a model without a head."""
    return next(FILE[f"{name}/{key}"] for key in OUTPUTS if f"{name}/{key}" in FILE)
