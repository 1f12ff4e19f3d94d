"""config.json of timm's ViT and DeiT as our configuration."""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError

NAME = re.compile(r"(?:vit|deit3?)_(\w+?)(?:_distilled)?_patch(\d+)_(\d+)(?:\.\w+)?")
HEAD_WIDTH = 64  # of every size but huge, which has 16 heads of 80
HUGE_HEADS = 16


def is_timm(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's."""
    return "architecture" in values and "model_type" not in values


def from_timm(values: Mapping[str, Any], tensors: Mapping[str, Any], origin: str) -> ConfigDict:
    """Returns the whole configuration of a model of timm.

    Args:
      values: of its config.json.
      tensors: its weights, whose shapes tell the sizes.
      origin: names the file in errors.

    Raises:
      UserError: another architecture than a plain ViT.
    """
    name = str(values["architecture"])
    match = NAME.fullmatch(name)
    if match is None or "patch_embed.proj.weight" not in tensors:
        raise UserError(
            f"{origin} is of timm's architecture {name!r}, expected a plain ViT such as "
            "vit_small_patch16_224 or deit_base_patch16_224: take another model."
        )
    own = values.get("model_args", {})
    unknown = own.keys() - {"img_size", "num_classes", "patch_size"}
    if unknown or any(part.endswith("ls1.gamma") for part in tensors):
        what = f"model_args.{min(unknown)}" if unknown else "LayerScale"
        raise UserError(f"{origin} has {what}, which our ViT does not compute: take another model.")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    layers = {int(m[1]) for part in tensors if (m := re.match(r"blocks\.(\d+)\.", part))}
    prefix = 1 + ("dist_token" in tensors)
    side = round((tensors["pos_embed"].shape[1] - prefix) ** 0.5)
    heads = HUGE_HEADS if match[1] == "huge" else width // HEAD_WIDTH
    config = default_config("vit")
    config.model.update(
        hidden_size=width,
        num_layers=len(layers),
        num_heads=heads,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        distillation=_distillation(tensors),
        patch_layer_norm="patch_embed.norm.weight" in tensors,
    )
    return config


def _distillation(tensors: Mapping[str, Any]) -> str:
    if "dist_token" not in tensors:
        return "none"
    return "head" if "head_dist.weight" in tensors else "token"


def preprocessing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg` as keys of transformers' preprocessor_config.json, and `crop_pct`."""
    found = values.get("pretrained_cfg", {})
    return {
        "image_mean": found.get("mean"),
        "image_std": found.get("std"),
        "crop_pct": found.get("crop_pct"),
    }
