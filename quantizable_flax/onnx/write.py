"""A model with its parameters and ranges as an ONNX graph, and as a folder."""

from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.models.bert import Bert
from quantizable_flax.models.opt import OptForCausalLM
from quantizable_flax.models.vit import VitForImageClassification
from quantizable_flax.onnx.bert import write_bert
from quantizable_flax.onnx.graph import Graph
from quantizable_flax.onnx.grids import Sites
from quantizable_flax.onnx.layers import Build
from quantizable_flax.onnx.opsets import LEAST
from quantizable_flax.onnx.opt import write_opt
from quantizable_flax.onnx.vit import write_vit

WRITERS = {
    Bert: write_bert,
    OptForCausalLM: write_opt,
    VitForImageClassification: write_vit,
}


def to_onnx(model: nn.Module, params: Any, ranges: Any = None, opset: int = LEAST) -> Any:
    graph = Graph(opset)
    sites = Sites(graph, jax.device_get(params), jax.device_get(ranges))
    WRITERS[type(model)](Build(graph, sites, model.config))
    return graph.finish()
