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
        gamma = _gamma(graph, seen, softmax)
        factor = _factor(graph, seen, softmax, gamma)
        return Around(shape, _bias(graph, seen), factor, column, gamma)


def shown(graph: Graph, mask_BxT: str, batch: str, registers: int) -> str:
    """The mask with registers, which all see, before the tokens: [B, registers + T]."""
    if not registers:
        return mask_BxT
    with graph.scope("mask"):
        shape = graph.node("Concat", batch, graph.constant([registers], np.int64), axis=0)
        ones = graph.node("Expand", graph.constant([1], np.int64), shape)
        return graph.node("Concat", ones, mask_BxT, axis=1)


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
        gamma = _gamma(graph, seen, softmax)
        return Around(shape, _bias(graph, seen), _factor(graph, seen, softmax, gamma), gamma=gamma)


def unmasked(graph: Graph, shape: str, softmax: SoftmaxConfig, tokens: int) -> Around:
    """Every query sees every key, of which there are so many."""
    if not softmax.alpha:
        return Around(shape, None, _stretch(graph, softmax))
    gamma = -softmax.alpha / tokens
    return Around(shape, None, graph.constant(softmax.zeta - gamma), gamma=graph.constant(gamma))


def positions(graph: Graph, mask_BxS: str) -> str:
    """`models.transformer.positions`: int64 [B, S], -1 for padding."""
    with graph.scope("positions"):
        mask = graph.node("Cast", mask_BxS, to=INT64)
        count = graph.node("CumSum", mask, graph.constant(1, np.int64))
        return graph.node("Sub", graph.node("Mul", count, mask), graph.constant(1, np.int64))


def _bias(graph: Graph, seen: str) -> str:
    return graph.node("Where", seen, graph.constant(0.0), graph.constant(LOWEST), name="bias")


def _gamma(graph: Graph, seen: str, softmax: SoftmaxConfig) -> str | None:
    """`nn.softmax.row_gammas`, None where all rows have the same."""
    if not softmax.alpha:
        return None
    last = graph.constant([-1], np.int64)
    count = graph.node("ReduceSum", graph.node("Cast", seen, to=FLOAT), last, keepdims=1)
    of_blind = graph.constant(1.0)
    if softmax.blind_queries == "uniform":
        keys = graph.node("Shape", seen, start=-1)
        of_blind = graph.node("Cast", keys, to=FLOAT)
    sees = graph.node("Greater", count, graph.constant(0.0))
    count = graph.node("Where", sees, count, of_blind)
    return graph.node("Div", graph.constant(-softmax.alpha), count, name="gamma")


def _factor(graph: Graph, seen: str, softmax: SoftmaxConfig, gamma: str | None) -> str | None:
    """The stretch, and 0 for queries that see no key: their softmax is uniform else."""
    stretch = _stretch(graph, softmax)
    if gamma is not None:
        stretch = graph.node("Sub", graph.constant(softmax.zeta), gamma)
    if softmax.blind_queries == "uniform":
        return stretch
    floats = graph.node("Cast", seen, to=FLOAT)
    last = graph.constant([-1], np.int64)
    any_key = graph.node("ReduceMax", floats, last, keepdims=1, name="factor")
    return any_key if stretch is None else graph.node("Mul", any_key, stretch)


def _stretch(graph: Graph, softmax: SoftmaxConfig) -> str | None:
    stretch = softmax.zeta - softmax.gamma
    return None if stretch == 1.0 else graph.constant(stretch)
