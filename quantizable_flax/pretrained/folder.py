"""A published model's folder as model, parameters, configuration and what its data need."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError
from quantizable_flax.interop import from_state_dict
from quantizable_flax.models.build import build_model
from quantizable_flax.pretrained.config_json import (
    FILE,
    OURS,
    apply_attention,
    class_names,
    from_transformers,
    read_json,
)
from quantizable_flax.pretrained.files import WEIGHTS, read_weights
from quantizable_flax.pretrained.gates import gates_of
from quantizable_flax.pretrained.hub import resolve
from quantizable_flax.pretrained.timm_json import from_timm, is_timm, preprocessing

HUB = "hf:"
POOLING = Path("1_Pooling", FILE)  # of sentence-transformers
PREPROCESSOR = "preprocessor_config.json"
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")

logger = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """What a folder holds.

    Attributes:
      config: a whole configuration; `data`, `eval` and so on as by default.
      model: the Linen module.
      params: its parameters, float32.
      assets: the tokenizer, and the names of the classes, where there are any.
    """

    config: ConfigDict
    model: nn.Module
    params: Any
    assets: dict[str, Any]


def from_pretrained(
    path: str | os.PathLike, *, attention: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any]:
    """Returns (model, params) of a published model, without PyTorch.

    Args:
      path: a folder with config.json and weights (safetensors or PyTorch's, whole or in shards), of
        transformers (BERT, RoBERTa, DistilBERT, OPT, ViT, DeiT), of timm (ViT, DeiT) or of the
        original implementation, gates included; or a name on the Hugging Face hub, `org/name`.
      attention: keys of `config.model.attention` that such a file does not hold, as
        `{"softmax": "clipped", "gamma": -0.025}`.

    Raises:
      UserError: no such folder, an architecture that we do not have, a missing, surplus or
        mis-shaped tensor, or a config.json that contradicts the weights.
    """
    found = read_folder(os.fspath(path), attention=attention, with_assets=False)
    return found.model, found.params


def is_published(path: str) -> bool:
    """Whether a path is that of a published model, and not of a run of ours."""
    if path.startswith(HUB):
        return True
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in WEIGHTS):
        return True  # reading says what is wrong with its config.json
    try:
        values = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and bool(values.keys() & {"model_type", "architecture"})


def read_folder(
    path: str, *, attention: Mapping[str, Any] | None = None, with_assets: bool = True
) -> Pretrained:
    """As `from_pretrained`, with the configuration and, if asked for, the tokenizer."""
    folder, values, tensors, config = _opened(path)
    apply_attention(config, attention or {}, "attention")
    model = build_model(config)
    try:
        params = jax.tree.map(jnp.asarray, from_state_dict(tensors, config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    assets = _assets(folder, values, config) if with_assets else {}
    return Pretrained(config, model, params, assets)


def read_folder_config(path: str) -> ConfigDict:
    """Returns the configuration of a published model alone, without reading its weights.

    Raises:
      UserError: as `from_pretrained`, but for what only the weights tell.
    """
    return _opened(path)[-1]


def _opened(path: str) -> tuple[Path, dict[str, Any], Mapping[str, Any], ConfigDict]:
    """Returns (folder, values of its config.json, tensors that nobody has read yet, config)."""
    folder = resolve(path.removeprefix(HUB))
    if not (folder / FILE).is_file():
        raise UserError(
            f"{path} should be a folder with a {FILE}, found none there: give the folder that "
            "holds config.json and the weights."
        )
    values, tensors = read_json(folder / FILE), read_weights(folder)
    config = read_config(folder, values, tensors)
    apply_attention(config, gates_of(tensors) if OURS not in values else {}, "the weights")
    return folder, values, tensors, config


def read_config(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> ConfigDict:
    """Returns the configuration of a folder.

    Args:
      folder: with files that say how text is pooled and images are prepared.
      values: of its config.json.
      tensors: its weights, by name.

    Raises:
      UserError: as `from_transformers` and `from_timm`.
    """
    origin = str(folder / FILE)
    if is_timm(values):
        config = from_timm(values, tensors, origin)
        _prepare(config, preprocessing(values))
        return config
    config = from_transformers(values, tensors, origin)
    if "pooling" in config.model and (folder / POOLING).is_file():
        modes = read_json(folder / POOLING)
        chosen = [mode for mode, on in modes.items() if on is True and mode.startswith("pooling")]
        if len(chosen) != 1 or chosen[0] not in POOLINGS:
            raise UserError(
                f"{folder / POOLING} pools by {' and '.join(chosen) or 'nothing'}, expected one of "
                f"{' and '.join(POOLINGS)}: take another model."
            )
        config.model.pooling = POOLINGS[chosen[0]]
    if "pixel_mean" in config.model:
        config.model.pixel_mean = config.model.pixel_std = (0.5,) * config.model.channels
        if (folder / PREPROCESSOR).is_file():
            _prepare(config, read_json(folder / PREPROCESSOR))
    return config


def _prepare(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """How images are normalised, and how much of them is kept."""
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if values.get(theirs) is not None:
            config.model[ours] = tuple(float(x) for x in values[theirs])
    if values.get("crop_pct") is not None:
        config.data.eval_crop = float(values["crop_pct"])


def _assets(folder: Path, values: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    assets: dict[str, Any] = {}
    if "seq_len" in config.data:
        assets |= _tokenizer(folder, config)
    classifies = config.model.get("head", "classifier") == "classifier"
    if classifies and config.model.get("num_classes"):
        names = class_names(values)
        if names or "seq_len" not in config.data:  # of images the data may name them
            assets["classes"] = names
    return assets


def _tokenizer(folder: Path, config: ConfigDict) -> dict[str, Any]:
    from quantizable_flax.data.text.tokenizer import Tokenizer  # Loading a model needs none.

    if not any((folder / name).is_file() for name in TOKENIZERS):
        return {}
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        logger.warning("the tokenizer of %s cannot be used: %s", folder, error)
        return {}
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, its model only "
            f"{config.model.vocab_size}: they are of two models, bring the right tokenizer."
        )
    return {"tokenizer": json.loads(tokenizer.to_json())}
