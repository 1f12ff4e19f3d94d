"""What a padding mask means to attention, as values that all layers of a graph read."""

from typing import Any

import numpy as np

from quantizable_flax.nn.softmax_config import SoftmaxConfig
from quantizable_flax.onnx.attention import LOWEST, Around
from quantizable_flax.onnx.graph import BOOL, FLOAT, INT64, Graph


def heads_shape(graph: Graph, batch: str, config: Any) -> str:
    """The shape [B, T, H, K] for rows, from the int64 [1] that holds B."""
    sizes = [-1, config.num_heads, config.hidden_size // config.num_heads]
    return graph.node("Concat", batch, graph.constant(sizes, np.int64), axis=0, name="heads_shape")


def padding(graph: Graph, mask_BxS: str, shape: str, softmax: SoftmaxConfig) -> Around:
    """Keys that are no padding are seen by every query."""
    with graph.scope("mask"):
        visible = graph.node("Cast", mask_BxS, to=BOOL, name="visible")
        seen = graph.node("Unsqueeze", visible, graph.constant([1, 2], np.int64))
        floats = graph.node("Cast", visible, to=FLOAT)
        column = graph.node("Unsqueeze", floats, graph.constant([2], np.int64), name="column")
        return Around(shape, _bias(graph, seen), _factor(graph, seen, softmax), column)


def causal(
    graph: Graph, mask_BxS: str, length: str, before: str, shape: str, softmax: SoftmaxConfig
) -> Around:
    """Of those, a query sees the keys up to its own place; int64 scalars: tokens now and before."""
    with graph.scope("mask"):
        zero, one = (graph.constant(i, np.int64) for i in (0, 1))
        keys = graph.node("Range", zero, graph.node("Add", before, length), one)
        places = graph.node("Range", before, graph.node("Add", before, length), one)
        places = graph.node("Unsqueeze", places, graph.constant([1], np.int64))
        earlier = graph.node("LessOrEqual", keys, places)  # [T, S]
        visible = graph.node("Cast", mask_BxS, to=BOOL, name="visible")
        visible = graph.node("Unsqueeze", visible, graph.constant([1, 2], np.int64))
        seen = graph.node("And", visible, earlier)
        return Around(shape, _bias(graph, seen), _factor(graph, seen, softmax))


def unmasked(graph: Graph, shape: str, softmax: SoftmaxConfig) -> Around:
    """Every query sees every key."""
    return Around(shape, None, _stretch(graph, softmax))


def positions(graph: Graph, mask_BxS: str) -> str:
    """`models.transformer.positions`: int64 [B, S], -1 for padding."""
    with graph.scope("positions"):
        mask = graph.node("Cast", mask_BxS, to=INT64)
        count = graph.node("CumSum", mask, graph.constant(1, np.int64))
        return graph.node("Sub", graph.node("Mul", count, mask), graph.constant(1, np.int64))


def _bias(graph: Graph, seen: str) -> str:
    return graph.node("Where", seen, graph.constant(0.0), graph.constant(LOWEST), name="bias")


def _factor(graph: Graph, seen: str, softmax: SoftmaxConfig) -> str | None:
    """The stretch, and 0 for queries that see no key: their softmax is uniform else."""
    if softmax.blind_queries == "uniform":
        return _stretch(graph, softmax)
    floats = graph.node("Cast", seen, to=FLOAT)
    last = graph.constant([-1], np.int64)
    any_key = graph.node("ReduceMax", floats, last, keepdims=1, name="factor")
    if softmax.zeta - softmax.gamma == 1.0:
        return any_key
    return graph.node("Mul", any_key, graph.constant(softmax.zeta - softmax.gamma))


def _stretch(graph: Graph, softmax: SoftmaxConfig) -> str | None:
    stretch = softmax.zeta - softmax.gamma
    return None if stretch == 1.0 else graph.constant(stretch)
