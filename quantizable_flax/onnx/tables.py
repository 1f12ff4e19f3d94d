"""Embedding tables as nodes: lookups of codes, and the decoder that shares them."""

from typing import Any

import numpy as np

from quantizable_flax.onnx.graph import FLOAT
from quantizable_flax.onnx.grids import Codes, Value
from quantizable_flax.onnx.layers import Build, product
from quantizable_flax.quantization.spec import QuantSpec


def lookup(build: Build, ids: str, name: str, spec: QuantSpec | None) -> Value:
    """`nn.layers.Embed`: int64 [...] -> [..., D]; the table is kept as codes."""
    graph, sites = build.graph, build.sites
    with graph.scope(name):
        found = sites.weight_codes(f"{graph.path}/weight", "embedding", spec)
        if found is None:
            table = sites.float_weight(f"{graph.path}/weight", "embedding")
            return Value(graph.node("Gather", graph.shared("embedding", table), ids))
    with graph.scope(name, "weight"):
        table, scale, zero_point = found
        rows = graph.node("Gather", graph.shared("codes", table), ids)
        if not scale.ndim:
            return sites.value(Codes(rows, scale, zero_point))
        # A scale for each row: gathered too, as DequantizeLinear wants scales that are constant.
        with graph.because("each row of the table has a scale of its own"):
            steps = graph.node("Cast", rows, to=FLOAT)
            scales = graph.node("Gather", graph.array("row_scale", scale[:, None]), ids)
            return Value(graph.node("Mul", steps, scales))


def decoder(
    build: Build, x: Value, word: str, spec: QuantSpec | None, bias: np.ndarray | None = None
) -> str:
    """Rows times the transposed word table [V, D]: the logits [N, V].

    Args:
      build: as everywhere.
      x: [N, D].
      word: path of the table's module.
      spec: of the head; None multiplies by the table in floating point.
      bias: [V], or None.
    """
    graph, sites = build.graph, build.sites
    found = sites.weight_codes(f"{word}/weight", "embedding", spec)
    if found is None:
        with graph.at(word):
            table = sites.float_weight(f"{word}/weight", "embedding")
            kernel = Value(graph.shared("embedding", table))
    else:
        with graph.at(f"{word}/weight"):
            kernel = sites.weight(*found, axis=0)
    with graph.scope("decoder"):
        return product(build, x, kernel, bias, spec, transposed=True)


def learned_table(build: Build, name: str) -> np.ndarray:
    """Learned rows on their grid of 8 bits, in floating point: they are few, and are added."""
    return build.sites.rounded(f"{build.graph.path}/{name}_weight", name, build.config.quant)


def learned_tokens(build: Build, name: str, batch: str) -> str:
    """[rows, D] for every example: [B, rows, D]."""
    graph, table = build.graph, learned_table(build, name)
    sizes = graph.constant(table.shape, np.int64)
    shape = graph.node("Concat", batch, sizes, axis=0)
    return graph.node("Expand", graph.array(name, table), shape)


def output_shape(build: Build, batch: str, width: Any) -> str:
    """The shape [B, T, width] for rows, from the int64 [1] that holds B."""
    sizes = build.graph.constant([-1, width], np.int64)
    return build.graph.node("Concat", batch, sizes, axis=0, name="output_shape")
