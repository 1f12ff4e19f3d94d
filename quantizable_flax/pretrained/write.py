"""A model as a folder that transformers reads, and `from_pretrained` does, without PyTorch."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn

from quantizable_flax.errors import UserError
from quantizable_flax.interop import state_dict_of
from quantizable_flax.models.build import FAMILIES, with_quant
from quantizable_flax.pretrained.config_json import FILE, OURS
from quantizable_flax.pretrained.folder import POOLING, POOLINGS, PREPROCESSOR
from quantizable_flax.pretrained.new_folder import check_new, writing
from quantizable_flax.pretrained.safetensors_file import write_safetensors
from quantizable_flax.pretrained.to_json import preprocessor, to_transformers, tokenizer_config

WEIGHTS = "model.safetensors"
# Of ViT, release 5 reads and writes the names of 4.
SOURCES = {"vit": "transformers 4"}
# Of sentence-transformers, whose folder is one of transformers with these beside it.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]

logger = logging.getLogger(__name__)


def to_huggingface(
    model: nn.Module,
    params: Mapping[str, Any],
    path: str,
    *,
    assets: Mapping[str, Any] | None = None,
    eval_crop: float = 1.0,
) -> Path:
    """Writes a model as transformers does, and returns the folder; `from_pretrained` reads it too.

    config.json notes gates and clipped softmax under a key of ours, `quantizable_flax`, and gates
    are in model.safetensors as the original's `alpha`: transformers itself knows neither. What is
    of training and of speed (label smoothing, Mixup, max_predictions, remat, dtype) is not kept;
    weights are float32.

    Args:
      model: of a family that transformers has, in floating point; a quant spec is left away.
      params: its parameters, as they were trained.
      path: a new or an empty folder.
      assets: `{"tokenizer": ..., "classes": ...}`, each if there is one: the content of a
        tokenizer.json, and the names of the classes by label.
      eval_crop: of a model of images, the share of the shorter side that is kept, in (0, 1].

    Raises:
      UserError: a family or an option that transformers lacks (registers, a LayerNorm behind the
        patches), a model on integers, smoothed parameters or those of another model, assets of
        another form, a folder that is not empty or cannot be written.
    """
    family, assets = _family_of(model), assets or {}
    _check_assets(assets)
    if "://" in str(path):
        raise UserError(f"path {path} must be a local folder: write to one, and copy that.")
    folder = Path(path).expanduser()
    with writing(folder):
        check_new(folder, f"path {path}")
    files = transformers_files(model, assets, eval_crop)
    tensors = state_dict_of(with_quant(model, None), params, family, SOURCES.get(family))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS, tensors)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(f"{text}\n", "utf-8")
    _tell(files[FILE], folder)
    return folder


def _check_assets(assets: Any) -> None:
    if not isinstance(assets, Mapping) or set(assets) - {"tokenizer", "classes"}:
        found = ", ".join(map(repr, assets)) if isinstance(assets, Mapping) else repr(assets)
        raise UserError(f'assets must be {{"tokenizer": ..., "classes": ...}}, found {found[:80]}.')
    tokenizer, classes = assets.get("tokenizer"), assets.get("classes")
    if tokenizer is not None and not (isinstance(tokenizer, Mapping) and "model" in tokenizer):
        raise UserError(
            'assets["tokenizer"] must be the content of a tokenizer.json, with a "model" in it: '
            f"read the file by json.load; found {str(tokenizer)[:80]!r}."
        )
    named = isinstance(classes, Sequence) and not isinstance(classes, str)
    if classes is not None and not (named and all(isinstance(name, str) for name in classes)):
        raise UserError(f'assets["classes"] must be a list of names, found {str(classes)[:80]!r}.')


def _family_of(model: nn.Module) -> str:
    config = model.config
    if config.quant is not None and config.quant.backend == "int8":
        raise UserError(
            "transformers computes in floating point, found a model that runs on integers: write "
            "the one that it came from."
        )
    return next(
        (name for name, family in FAMILIES.items() if family.config is type(config)),
        type(config).__name__,
    )


def transformers_files(
    model: nn.Module, assets: Mapping[str, Any], eval_crop: float
) -> dict[str, Any]:
    """Content of each file of JSON by its name; config.json is last, by which a folder is known.

    Args:
      model: of a family that transformers has, in floating point.
      assets, eval_crop: as `to_huggingface` takes them.

    Raises:
      UserError: as `to_huggingface`, of the model.
    """
    family, config = _family_of(model), model.config
    main = to_transformers(family, config, assets.get("classes"))
    files: dict[str, Any] = side_files(config, assets, eval_crop)
    if hasattr(config, "pooling") and config.pooling != type(config).pooling:
        modes = {mode: pooling == config.pooling for mode, pooling in POOLINGS.items()}
        files[str(POOLING)] = {"word_embedding_dimension": config.hidden_size, **modes}
        if getattr(config, "head", None) in ("none", "pooler"):
            files["modules.json"] = MODULES
    return {**files, FILE: main}


def side_files(config: Any, assets: Mapping[str, Any], eval_crop: float) -> dict[str, Any]:
    """Of those, what turns texts or images into inputs."""
    files: dict[str, Any] = {}
    if tokenizer := assets.get("tokenizer"):
        files["tokenizer.json"] = tokenizer
        length = config.max_position_embeddings
        files["tokenizer_config.json"] = tokenizer_config(tokenizer, length)
    if hasattr(config, "pixel_mean"):
        files[PREPROCESSOR] = preprocessor(config, eval_crop)
    return files


def _tell(main: Any, folder: Path) -> None:
    attention = main.get(OURS, {}).get("attention", {})
    if attention.get("softmax") == "clipped" or "gate" in attention:
        logger.warning(
            "transformers computes %s with vanilla attention, without the gates and the clipped "
            "softmax that its %s notes, unless it is given docs/transformers_attention.md's module",
            folder,
            FILE,
        )
