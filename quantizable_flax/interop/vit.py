"""ViT weights under Hugging Face's names or timm's, plus `alpha.*` for the gates."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.interop.attention import attention_params, layer_params
from quantizable_flax.interop.torch_layout import TensorReader, Tree

IGNORABLE = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")


def vit_params(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` tree of `VitForImageClassification`, numpy float32.

    Names as of `transformers.ViTForImageClassification`, or of timm where there is a
    `patch_embed.proj.weight` (its fused qkv is split; gates and registers are not read there).

    Raises:
      UserError: a missing tensor, a wrong shape, a tensor without a place, or registers of timm.
    """
    reader = TensorReader(mapping)
    params = (_timm if reader.has("patch_embed.proj.weight") else _hugging_face)(
        reader, config.model
    )
    reader.check_all_used(IGNORABLE)
    return params


def _hugging_face(reader: TensorReader, model: ml_collections.ConfigDict) -> Tree:
    start = "vit.embeddings."
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
        "final_layer_norm": reader.layer_norm("vit.layernorm", model.hidden_size),
        "head": reader.linear("classifier", model.hidden_size, model.num_classes),
    }
    width = model.hidden_size
    for i in range(model.num_layers):
        prefix = f"vit.encoder.layer.{i}."
        attention = attention_params(reader, f"{prefix}attention.attention.", width, model)
        attention["output"] = reader.linear(f"{prefix}attention.output.dense", width, width)
        params[f"layer_{i}"] = layer_params(
            reader,
            prefix,
            model,
            attention,
            attention_norm="layernorm_before",
            ffn_in="intermediate.dense",
            ffn_out="output.dense",
            ffn_norm="layernorm_after",
        )
    return params


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
