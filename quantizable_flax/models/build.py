"""The one place that maps a configuration to a model."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.models import bert, bert_config, opt, opt_config, vit, vit_config
from quantizable_flax.nn.gate import GateConfig
from quantizable_flax.nn.softmax_config import SoftmaxConfig, make_softmax
from quantizable_flax.quantization.spec import QuantSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Family(NamedTuple):
    """A model family: its module and the frozen config that this takes."""

    module: Any
    config: Any


FAMILIES = {
    "bert": Family(bert.Bert, bert_config.BertConfig),
    "roberta": Family(bert.Bert, bert_config.RobertaConfig),
    "distilbert": Family(bert.Bert, bert_config.DistilBertConfig),
    "opt": Family(opt.OptForCausalLM, opt_config.OptConfig),
    "vit": Family(vit.VitForImageClassification, vit_config.VitConfig),
}


def register(name: str, module: Any, config: Any) -> None:
    """Adds a family, or replaces it: `model.name=NAME` is a model of it from then on.

    Args:
      name: of the family, in configurations and checkpoints.
      module: a Linen module with one field, `config`; see docs/new_model.md.
      config: a frozen dataclass that derives from `TransformerConfig`.
    """
    FAMILIES[name] = Family(module, config)


def build_model(config: ml_collections.ConfigDict) -> nn.Module:
    """Returns the Linen module that `config.model` describes.

    Args:
      config: as `quantizable_flax.config.default_config(family)`; for `attention.alpha`,
        `data.seq_len` (text) or the number of tokens (images) gives T.

    Raises:
      UserError: unknown model, softmax, gate or dtype, or sizes that do not fit together.
    """
    model = config.model
    check_choice("model.name", model.name, FAMILIES)
    family = FAMILIES[model.name]
    fields = {field.name for field in dataclasses.fields(family.config)}
    keys = set(model) - {"name", "attention", "dtype"}
    if keys - fields:
        raise UserError(
            f"model.name cannot be changed to {model.name!r} in a configuration of another family "
            f"(it has model.{min(keys - fields)}): start from a recipe of that family."
        )
    check_choice("model.dtype", model.dtype, DTYPES)
    # A tuple, so that the frozen config can be hashed.
    values = {key: tuple(v) if isinstance(v := model[key], list) else v for key in keys}
    built = family.config(
        **values,
        dtype=DTYPES[model.dtype],
        remat=config.train.remat,
        loss_chunk=config.train.loss_chunk,
        attention_kernel=config.train.attention_kernel,
        gate=_gate(model.attention),
        qk_norm=model.attention.qk_norm,
    )
    return family.module(dataclasses.replace(built, softmax=_softmax(config, built)))


def _softmax(config: ml_collections.ConfigDict, built: Any) -> SoftmaxConfig:
    attention = config.model.attention
    return make_softmax(
        attention.softmax,
        gamma=attention.gamma,
        zeta=attention.zeta,
        alpha=attention.alpha,
        length_normalised=attention.length_normalised,
        seq_len=built.length(config.data),
        blind_queries=attention.blind_queries,
        sink=attention.sink,
        causal=built.causal,
    )


def with_config(model: nn.Module, **changes: Any) -> nn.Module:
    """Returns the same model with fields of its config replaced."""
    return model.clone(config=dataclasses.replace(model.config, **changes))


def with_quant(model: nn.Module, spec: QuantSpec | None) -> nn.Module:
    """Returns the same model with every site quantized by `spec`, or none for None.

    Args:
      model: of a family, or your own with a field `quant` that it hands to its layers and sites.
      spec: how to quantize.

    Raises:
      UserError: the spec names a LayerNorm before the head where there is none, or the model has
        no field `quant`.
    """
    if not hasattr(model, "config"):
        quant_spec(model)
        return model.clone(quant=spec)
    if spec is not None and spec.final_layer_norm_bits and not model.has_final_layer_norm:
        raise UserError(
            f"this {type(model).__name__} has no LayerNorm before its head, found quant.coverage "
            "with int16_final_LN: use int16_all_LN or leave it out."
        )
    return with_config(model, quant=spec)


def quant_spec(model: nn.Module) -> QuantSpec | None:
    """Returns the scheme of a model, from its config or its own field.

    Raises:
      UserError: it has neither.
    """
    holder = getattr(model, "config", model)
    if not hasattr(holder, "quant"):
        raise UserError(
            f"a model to quantize needs a field `quant`, found none in {type(model).__name__}: add "
            "`quant: qf.QuantSpec | None = None` and hand it to its layers and sites."
        )
    return holder.quant


def check_length(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the data's sequences are longer than the model's position table."""
    if "seq_len" not in config.data:
        return
    if not 1 <= config.data.seq_len <= config.model.max_position_embeddings:
        raise UserError(
            "data.seq_len must be at most model.max_position_embeddings, found "
            f"{config.data.seq_len} and {config.model.max_position_embeddings}: shorten the "
            "sequences or add positions."
        )


def _gate(attention: ml_collections.ConfigDict) -> GateConfig | None:
    if attention.gate == "none":
        return None
    return GateConfig(
        kind=attention.gate,
        pooling=attention.gate_pooling,
        hidden=attention.gate_hidden,
        pi_init=attention.gate_pi_init,
        init_std=attention.gate_init_std,
        finetune=attention.gate_finetune,
    )


def attention_label(config: ml_collections.ConfigDict) -> str:
    """Returns the attention variant in a few words, e.g. `clipped softmax (gamma=-0.03)`."""
    attention = config.model.attention
    parts = []
    if attention.softmax == "clipped":
        keys = [key for key in ("gamma", "zeta", "alpha") if attention[key] is not None]
        values = ", ".join(f"{key}={attention[key]:g}" for key in keys)
        by_row = ", length-normalised" if attention.length_normalised else ""
        parts.append(f"clipped softmax ({values}{by_row})")
    if attention.sink != "none":
        parts.append({"zero": "softmax1", "learned": "learned sink"}[attention.sink])
    if attention.qk_norm:
        parts.append("QK-norm")
    if attention.gate != "none":
        parts.append(f"gated ({attention.gate.replace('_', ' ')})")
    if registers := config.model.get("num_registers", 0):
        parts.append(f"{registers} register{'s' * (registers > 1)}")
    return " + ".join(parts) or "vanilla"
