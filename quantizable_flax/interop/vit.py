"""ViT weights under Hugging Face's names or timm's, plus `alpha.*` for the gates."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.interop.attention import attention_params, layer_params
from quantizable_flax.interop.torch_layout import TensorReader, Tree

ANCHOR = "embeddings.patch_embeddings.projection.weight"
TIMM_ANCHOR = "patch_embed.proj.weight"
# Names within a layer: of transformers 4, and of what 5 renamed.
NAMES = {
    "query": ("attention.attention.query", "attention.q_proj"),
    "key": ("attention.attention.key", "attention.k_proj"),
    "value": ("attention.attention.value", "attention.v_proj"),
    "output": ("attention.output.dense", "attention.o_proj"),
    "gate": ("attention.attention.alpha", "attention.alpha"),
    "ffn_in": ("intermediate.dense", "mlp.fc1"),
    "ffn_out": ("output.dense", "mlp.fc2"),
}
PROJECTIONS = ("query", "key", "value", "output")


def vit_params(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` tree of `VitForImageClassification`, numpy float32.

    Names as of `transformers.ViTForImageClassification`, releases 4 and 5, or of timm where there
    is a `patch_embed.proj.weight` (its fused qkv is split; gates and registers are not read there).

    Raises:
      UserError: a missing tensor or head, a wrong shape, a tensor without a place, or registers of
        timm.
    """
    reader = TensorReader(mapping, TIMM_ANCHOR)
    if reader.found:
        params = _timm(reader, config.model)
    else:
        reader = TensorReader(mapping, ANCHOR, ("vit.", ""))
        params = _hugging_face(reader, config.model)
    reader.check_all_used()
    return params


def _hugging_face(reader: TensorReader, model: ml_collections.ConfigDict) -> Tree:
    if reader.found and not reader.holds("classifier"):
        raise UserError(
            "the weights have no tensors classifier.*, the head: they are of an encoder alone or "
            "of another architecture, save ViTForImageClassification."
        )
    start = f"{reader.root}embeddings."
    params: Tree = {
        "embeddings": _embeddings(
            reader,
            model,
            patch=f"{start}patch_embeddings.projection",
            norm=f"{start}layernorm",
            cls=f"{start}cls_token",
            position=f"{start}position_embeddings",
            registers=f"{start}register_tokens",
        ),
        "final_layer_norm": reader.layer_norm(f"{reader.root}layernorm", model.hidden_size),
        "head": reader.linear("classifier", model.hidden_size, model.num_classes),
    }
    layers = [reader.root + name for name in ("encoder.layer", "layers")]
    first = reader.first(*layers)
    for i in range(model.num_layers):
        prefix = f"{first}.{i}."
        params[f"layer_{i}"] = _layer(reader, prefix, model, renamed=first == layers[1])
    reader.ignore(*(f"{reader.root}pooler.dense.{end}" for end in ("weight", "bias")))
    return params


def _layer(
    reader: TensorReader, prefix: str, model: ml_collections.ConfigDict, *, renamed: bool
) -> Tree:
    names = {
        ours: reader.first(*(prefix + name for name in (theirs[::-1] if renamed else theirs)))
        for ours, theirs in NAMES.items()
    }
    projections = {ours: names[ours] for ours in PROJECTIONS}
    return layer_params(
        reader,
        "",
        model,
        attention_params(reader, "", model.hidden_size, model, projections, names["gate"]),
        attention_norm=f"{prefix}layernorm_before",
        ffn_in=names["ffn_in"],
        ffn_out=names["ffn_out"],
        ffn_norm=f"{prefix}layernorm_after",
    )


def _timm(reader: TensorReader, model: ml_collections.ConfigDict) -> Tree:
    if model.attention.gate != "none":
        raise UserError(
            "weights under timm's names have no gates, found "
            f"model.attention.gate={model.attention.gate!r}: set it to none."
        )
    width = model.hidden_size
    if model.num_registers:
        raise UserError(
            "timm's models with registers add positions to them or to patches alone, found "
            f"model.num_registers={model.num_registers}: use weights under Hugging Face's names."
        )
    params: Tree = {
        "embeddings": _embeddings(
            reader,
            model,
            patch="patch_embed.proj",
            norm="patch_embed.norm",
            cls="cls_token",
            position="pos_embed",
        ),
        "final_layer_norm": reader.layer_norm("norm", width),
        "head": reader.linear("head", width, model.num_classes),
    }
    for i in range(model.num_layers):
        prefix = f"blocks.{i}."
        fused = reader.linear(f"{prefix}attn.qkv", width, 3 * width)
        parts = {name: np.split(value, 3, axis=-1) for name, value in fused.items()}
        attention: Tree = {
            ours: {name: split[k] for name, split in parts.items()}
            for k, ours in enumerate(("query", "key", "value"))
        }
        attention["output"] = reader.linear(f"{prefix}attn.proj", width, width)
        params[f"layer_{i}"] = layer_params(
            reader,
            prefix,
            model,
            attention,
            attention_norm="norm1",
            ffn_in="mlp.fc1",
            ffn_out="mlp.fc2",
            ffn_norm="norm2",
        )
    return params


def _embeddings(
    reader: TensorReader,
    model: ml_collections.ConfigDict,
    *,
    patch: str,
    norm: str,
    cls: str,
    position: str,
    registers: str = "",
) -> Tree:
    width = model.hidden_size
    tokens = 1 + (model.image_size // model.patch_size) ** 2
    embeddings: Tree = {
        "patch_embedding": reader.patches(patch, model.patch_size, model.channels, width),
        "cls_token": reader.take(cls, (1, 1, width))[0],
        "position_table": reader.take(position, (1, tokens, width))[0],
    }
    if model.patch_layer_norm:
        embeddings["patch_layer_norm"] = reader.layer_norm(norm, width)
    if model.num_registers:
        shape = (1, model.num_registers, width)
        embeddings["register_tokens"] = reader.take(registers, shape)[0]
    return embeddings
