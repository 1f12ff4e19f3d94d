"""The one place that maps a configuration to a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from quantizable_flax.attention.gate import GateConfig
from quantizable_flax.attention.softmax import make_softmax
from quantizable_flax.errors import UserError, nearest
from quantizable_flax.models import bert
from quantizable_flax.quantization.spec import QuantSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(config: ml_collections.ConfigDict) -> nn.Module:
    """Returns the Linen module that `config.model` describes.

    Args:
      config: as `quantizable_flax.config.default_config()`; `data.seq_len` gives T for
        `attention.alpha`.

    Raises:
      UserError: unknown model, softmax, gate or dtype, or sizes that do not fit together.
    """
    name = config.model.name
    if name not in BUILDERS:
        raise UserError(
            f"model.name must be one of {', '.join(BUILDERS)}, found {name!r}"
            f"{nearest(name, BUILDERS)}."
        )
    return BUILDERS[name](config)


def with_config(model: nn.Module, **changes: Any) -> nn.Module:
    """Returns the same model with fields of its config replaced."""
    return model.clone(config=dataclasses.replace(model.config, **changes))


def with_quant(model: nn.Module, spec: QuantSpec | None) -> nn.Module:
    """Returns the same model with every site quantized by `spec`, or none for None."""
    return with_config(model, quant=spec)


def check_length(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the data's sequences are longer than the model's position table."""
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
        per=attention.gate_per,
        hidden=attention.gate_hidden,
        pi_init=attention.gate_pi_init,
        init_std=attention.gate_init_std,
        finetune=attention.gate_finetune,
    )


def _bert(config: ml_collections.ConfigDict) -> bert.BertForMaskedLM:
    model, attention = config.model, config.model.attention
    if model.dtype not in DTYPES:
        raise UserError(
            f"model.dtype must be one of {', '.join(DTYPES)}, found {model.dtype!r}"
            f"{nearest(model.dtype, DTYPES)}."
        )
    if model.hidden_size % model.num_heads:
        raise UserError(
            "model.num_heads must divide model.hidden_size, found "
            f"{model.num_heads} heads and hidden size {model.hidden_size}."
        )
    softmax_fn = make_softmax(
        attention.softmax,
        gamma=attention.gamma,
        zeta=attention.zeta,
        alpha=attention.alpha,
        seq_len=config.data.seq_len,
    )
    same_name = (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
        "initializer_range",
        "hidden_dropout",
        "attention_dropout",
        "pad_token_id",
        "max_predictions",
    )
    return bert.BertForMaskedLM(
        bert.BertConfig(
            **{key: model[key] for key in same_name},
            dtype=DTYPES[model.dtype],
            softmax_fn=softmax_fn,
            gate=_gate(attention),
        )
    )


def attention_label(config: ml_collections.ConfigDict) -> str:
    """Returns the attention variant in a few words, e.g. `clipped softmax (gamma=-0.03)`."""
    attention = config.model.attention
    parts = []
    if attention.softmax == "clipped":
        keys = [key for key in ("gamma", "zeta", "alpha") if attention[key] is not None]
        values = ", ".join(f"{key}={attention[key]:g}" for key in keys)
        parts.append(f"clipped softmax ({values})")
    if attention.gate != "none":
        parts.append(f"gated ({attention.gate.replace('_', ' ')})")
    return " + ".join(parts) or "vanilla"


BUILDERS: dict[str, Callable[[ml_collections.ConfigDict], nn.Module]] = {"bert": _bert}
