"""The gate on each head's output as nodes: in floating point, as everywhere."""

from typing import Any

import numpy as np

from quantizable_flax.onnx.grids import Value
from quantizable_flax.onnx.layers import Build

GATE = "gates stay in floating point, as published"


def gate(build: Build, x: Value, v: Value, around: Any) -> str:
    """`nn.gate.Gate`: the factor on the context, broadcasts to [B, T, H, K].

    Args:
      build: as everywhere.
      x: rows [N, D], the input of attention.
      v: [B, H, T, K], the values of the same tokens.
      around: what all layers read.
    """
    graph, config = build.graph, build.config.gate
    heads = build.config.num_heads
    path = graph.path.rpartition("/")[0]  # beside `context`
    params = {k: np.asarray(v, np.float32) for k, v in build.sites.module(f"{path}/gate").items()}
    with graph.scope("gate"), graph.because(GATE):
        if config.kind == "unconditional":
            logits = graph.array("logit", params["logit"][:, None])  # [H, 1]
            return _factor(build, logits)
        if config.kind == "value":
            logits = _of_values(build, v, params)
        else:
            logits, shape = _logits(build, x, params, heads), around.heads_shape
            if config.kind != "elementwise":
                shape = _with_last(build, shape, 1)
            logits = graph.node("Reshape", logits, shape)
        return _factor(build, _pooled(build, logits, around) if config.pooled else logits)


def _of_values(build: Build, v: Value, params: dict[str, np.ndarray]) -> str:
    """[B, H, T, K] -> [B, T, H, 1]."""
    graph = build.graph
    kernel = graph.array("kernel", params["kernel"][:, :, None])
    logits = graph.node("MatMul", v.name, kernel)  # [B, H, T, 1]
    logits = graph.node("Add", logits, graph.array("bias", params["bias"][:, None, None]))
    return graph.node("Transpose", logits, perm=[0, 2, 1, 3])


def _logits(build: Build, x: Value, params: dict[str, np.ndarray], heads: int) -> str:
    """[N, D] -> [N, H], elementwise [N, D]."""
    graph, kind = build.graph, build.config.gate.kind
    bias = graph.array("bias", params["bias"].reshape(-1))
    if kind in ("all_heads_linear", "elementwise"):
        matrix = params["kernel"].reshape(len(params["kernel"]), -1)
        return graph.node("Gemm", x.name, graph.array("kernel", matrix), bias)
    if kind == "linear":
        # One product with each head's kernel in the rows of its slice and zeros elsewhere.
        spread = np.zeros((heads, params["kernel"].shape[1], heads), np.float32)
        spread[np.arange(heads), :, np.arange(heads)] = params["kernel"]
        kernel = graph.array("kernel", spread.reshape(-1, heads))
        return graph.node("Gemm", x.name, kernel, bias)
    size = build.config.hidden_size // heads
    split = graph.node("Reshape", x.name, graph.constant([-1, heads, size], np.int64))
    by_head = graph.node("Transpose", split, perm=[1, 0, 2])  # [H, N, K]
    hidden = graph.node("MatMul", by_head, graph.array("hidden_kernel", params["hidden_kernel"]))
    hidden_bias = graph.array("hidden_bias", params["hidden_bias"][:, None])
    hidden = graph.node("Relu", graph.node("Add", hidden, hidden_bias))
    kernel = graph.array("kernel", params["kernel"][:, :, None])
    logits = graph.node("MatMul", hidden, kernel)  # [H, N, 1]
    logits = graph.node("Squeeze", logits, graph.constant([2], np.int64))
    return graph.node("Add", graph.node("Transpose", logits, perm=[1, 0]), bias)


def _pooled(build: Build, logits: str, around: Any) -> str:
    """The mean of [B, T, H, N] over the tokens that the gate is to see: [B, 1, H, N]."""
    graph = build.graph
    axis = graph.constant([1], np.int64)
    if around.visible_BxSx1 is None or not build.config.gate.masked:
        return graph.node("ReduceMean", logits, axis, keepdims=1)
    visible = graph.node("Unsqueeze", around.visible_BxSx1, graph.constant([3], np.int64))
    total = graph.node("ReduceSum", graph.node("Mul", logits, visible), axis, keepdims=1)
    count = graph.node("ReduceSum", visible, axis, keepdims=1)
    return graph.node("Div", total, graph.node("Max", count, graph.constant(1.0)))


def _factor(build: Build, logits: str) -> str:
    graph, config = build.graph, build.config.gate
    factor = graph.node("Sigmoid", logits)
    if config.scale == 1.0:
        return factor
    return graph.node("Mul", factor, graph.constant(config.scale))


def _with_last(build: Build, heads_shape: str, last: int) -> str:
    """The shape [B, T, H, last]."""
    graph = build.graph
    first = graph.node("Slice", heads_shape, *(graph.constant([i], np.int64) for i in (0, 3)))
    return graph.node("Concat", first, graph.constant([last], np.int64), axis=0)
