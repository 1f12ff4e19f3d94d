"""A model with its parameters and ranges as an ONNX graph, and as a folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from quantizable_flax.errors import UserError
from quantizable_flax.models.bert import Bert
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.opt import OptForCausalLM
from quantizable_flax.models.vit import VitForImageClassification
from quantizable_flax.onnx.attention import check_softmax
from quantizable_flax.onnx.bert import write_bert
from quantizable_flax.onnx.graph import Graph, write
from quantizable_flax.onnx.grids import Sites
from quantizable_flax.onnx.layers import Build
from quantizable_flax.onnx.opsets import LEAST, WIDE, check_opset
from quantizable_flax.onnx.opt import check_past, write_opt
from quantizable_flax.onnx.report import Report, make_report
from quantizable_flax.onnx.vit import write_vit
from quantizable_flax.pretrained.new_folder import writing
from quantizable_flax.pretrained.write import side_files, transformers_files
from quantizable_flax.quantization.learned import without_grids
from quantizable_flax.quantization.spec import BIT_FIELDS, INT8_BITS, QuantSpec

MODEL, REPORT = "model.onnx", "quantization.json"
WRITERS = {
    Bert: write_bert,
    OptForCausalLM: write_opt,
    VitForImageClassification: write_vit,
}

logger = logging.getLogger(__name__)


class Exported(NamedTuple):
    """A model as ONNX.

    Attributes:
      model: the `onnx.ModelProto`; `SerializeToString()` is what ONNX Runtime's session takes.
      report: its products, and what computes in floating point and why.
    """

    model: Any
    report: Report


def to_onnx(
    model: nn.Module, params: Mapping[str, Any], ranges: Any = None, *, opset: int = LEAST
) -> Exported:
    """Returns a model as one ONNX graph, for batches and texts of any size.

    Inputs are named as by transformers: `input_ids`, `attention_mask` and `token_type_ids` (int64),
    or `pixel_values` [batch, channels, height, width], floats that are normalised; OPT takes
    `past_key_values.0.key` [batch, heads, past, size] and so on, and a mask of past and present
    tokens. Outputs are `logits`, or `last_hidden_state` and `pooler_output`, and `present.0.key`.
    Where the model has a quant spec, each site is a QuantizeLinear and a DequantizeLinear by its
    calibrated range or its learned grid, and weights are integers.

    Args:
      model: a BERT, an OPT or a ViT of this package; what it computes in, it becomes float32.
      params: its parameters.
      ranges: the collection that `calibrate` returned, None for a model in floating point.
      opset: of the ONNX standard, 20..24; more than 8 bits need 21.

    Raises:
      UserError: another family or softmax, ranges of rows, gates that average over a past, or an
        opset that does not have what the model needs.
    """
    check_model(model)
    check_spec(model.config.quant, opset)
    graph = Graph(opset)
    if model.config.quant is None:
        params = without_grids(params)
    sites = Sites(graph, jax.device_get(params), jax.device_get(ranges))
    WRITERS[type(model)](Build(graph, sites, model.config))
    finished = graph.finish()
    return Exported(finished, make_report(finished, graph.reasons, model.config.quant))


def check_model(model: nn.Module) -> None:
    """Raises UserError for a model that has no ONNX graph."""
    if type(model) not in WRITERS:
        names = ", ".join(known.__name__ for known in WRITERS)
        raise UserError(
            f"an ONNX graph is written of {names}, found {type(model).__name__}: export it with "
            "--to=int8, whose program is of any model."
        )
    check_softmax(model.config.softmax)
    if type(model) is OptForCausalLM:
        check_past(model.config)


def check_spec(spec: QuantSpec | None, opset: int) -> None:
    """Raises UserError for a scheme that an ONNX graph of this opset cannot say exactly."""
    check_opset(opset)
    if spec is None:
        return
    if spec.activation_ranges != "static":
        raise UserError(
            "an ONNX graph needs static ranges, found +token, which takes those of each row at run "
            "time: leave it out."
        )
    if spec.hadamard is not None:
        raise UserError(
            "an ONNX graph has no rotations before its grids, found +hadamard or quant.hadamard: "
            "leave it out, or export with --to=int8."
        )
    if spec.backend == "int8":
        raise UserError(
            "an ONNX graph is written of a simulation, found a model on integers: give the model "
            "and the ranges that it was made from."
        )
    bits = [getattr(spec, field) for field in BIT_FIELDS] + [bits for _, bits in spec.site_bits]
    if max(number or 0 for number in bits) > INT8_BITS and opset < WIDE:
        raise UserError(
            f"more than {INT8_BITS} bits need --opset={WIDE} or more, found --opset={opset}: set "
            "it, or take fewer bits."
        )


def write_onnx(
    folder: Path,
    exported: Exported,
    model: nn.Module,
    *,
    assets: Mapping[str, Any] | None = None,
    eval_crop: float = 1.0,
) -> None:
    """Writes the graph, and beside it what readers of such folders look for.

    `model.onnx` (with `model.onnx.data` above 2 GiB), `quantization.json`, the tokenizer's or the
    image processor's files, and the `config.json` of transformers where that has the model.

    Args:
      folder: a new or an empty one.
      exported: from `to_onnx`.
      model: that it was made from.
      assets: the run's tokenizer and names of classes, each if there is one.
      eval_crop: of a model of images, as `to_huggingface`.

    Raises:
      UserError: the folder cannot be written.
    """
    model, assets = with_quant(model, None), dict(assets or {})
    try:
        files = transformers_files(model, assets, eval_crop)
    except UserError as error:
        logger.info("without the config.json of transformers: %s", error)
        files = side_files(model.config, assets, eval_crop)
    files[REPORT] = exported.report.as_json()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(exported.model, folder / MODEL)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(f"{text}\n", "utf-8")
