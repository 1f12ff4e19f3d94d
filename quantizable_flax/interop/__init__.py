"""Weights of the original implementation, of Hugging Face and of timm as ours, and back."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.interop.engine import Tree, read, shapes_of, write
from quantizable_flax.models.build import build_model
from quantizable_flax.models.weights import WeightNames


def from_state_dict(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` of `build_model(config)` from tensors under their original names.

    Args:
      mapping: original tensor name -> array in PyTorch's layout (a `state_dict` as numpy); what
        torch.compile, DDP, FSDP and Lightning put before or into the names is left away.
      config: as for `build_model`.

    Raises:
      UserError: unknown model, a missing tensor or head, a wrong shape, a tensor without a place,
        or an untied head.
    """
    model = build_model(config)
    return read(mapping, _tables(model, config.model.name), shapes_of(model), model.config)


def to_state_dict(
    params: Mapping[str, Any], config: ml_collections.ConfigDict, *, source: str | None = None
) -> dict[str, np.ndarray]:
    """Returns tensors under their original names, float32, which `from_state_dict` reads back.

    A tied head is there under both of its names, as one array.

    Args:
      params: of `build_model(config)`, neither smoothed nor as int8 codes.
      config: as for `build_model`.
      source: whose names. "transformers", and None, are those of BertForMaskedLM, OPTForCausalLM
        and ViTForImageClassification in transformers, release 5; of ViT there are also
        "transformers 4" and "timm".

    Raises:
      UserError: unknown model or source, params of another model, or a part of the model that the
        source does not have.
    """
    return state_dict_of(build_model(config), params, config.model.name, source)


def state_dict_of(
    model: nn.Module, params: Mapping[str, Any], family: str, source: str | None = None
) -> dict[str, np.ndarray]:
    """As `to_state_dict`, of a model in floating point whose family is known."""
    tables = {table.source: table for table in _tables(model, family)}
    source = next(iter(tables)) if source is None else source
    check_choice("source", source, tables)
    return write(params, tables[source], shapes_of(model), model.config)


def _tables(model: nn.Module, family: str) -> tuple[WeightNames, ...]:
    tables, norm = model.config.weight_names, model.config.norm
    if norm != "layer_norm":
        raise UserError(
            f"the names of other checkpoints are those of models with LayerNorms, found "
            f"model.norm={norm}: use the checkpoint of the run."
        )
    if not tables:
        raise UserError(
            f"weights of model.name={family} have no names in other checkpoints: give its config "
            "weight_names (docs/new_model.md)."
        )
    return tables
