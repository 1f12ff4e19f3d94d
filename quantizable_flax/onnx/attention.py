"""Multi-head attention as nodes: scores, softmax, gate, and the keys and values of the past."""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.nn.head_norm import EPSILON
from quantizable_flax.nn.softmax_config import SoftmaxConfig
from quantizable_flax.onnx.gate import GATE, gate
from quantizable_flax.onnx.graph import Graph
from quantizable_flax.onnx.grids import Value
from quantizable_flax.onnx.layers import Build, dense, float_reason, rms_norm
from quantizable_flax.quantization.spec import QuantSpec

LOWEST = float(np.finfo(np.float32).min)
QUERIES, KEYS = [0, 2, 1, 3], [0, 2, 3, 1]  # [B, T, H, K] -> [B, H, T, K], [B, H, K, T]
SOFTMAX = "softmax, with mask, stretch and clip, is in float32 between the grids around it"


@dataclasses.dataclass(frozen=True)
class Around:
    """What all layers of a graph read.

    Attributes:
      heads_shape: the shape [B, T, H, K], a value.
      bias: added to the scores, 0 or the lowest float: broadcasts to [B, H, T, S]; None for none.
      factor: on the probabilities, of each query: 0 where it sees no key, else the stretch;
        broadcasts to [B, 1, T, 1]. None where it is 1.
      visible_BxSx1: the padding of BERT as floats, for gates that average over it.
      gamma: the lower stretch of each query where those differ, broadcasts to [B, 1, T, 1]; None
        where it is the softmax's.
    """

    heads_shape: str
    bias: str | None = None
    factor: str | None = None
    visible_BxSx1: str | None = None
    gamma: str | None = None


class Past(NamedTuple):
    """Keys and values before the tokens of this call, [B, H, P, K]."""

    key: str
    value: str


def check_softmax(softmax: object) -> SoftmaxConfig:
    """Returns the softmax of a model as data.

    Raises:
      UserError: it is a function of the user's.
    """
    if not isinstance(softmax, SoftmaxConfig):
        raise UserError(
            "an ONNX graph needs a softmax that qf.make_softmax gives, found a function "
            f"{getattr(softmax, '__name__', type(softmax).__name__)}: train with one of ours."
        )
    return softmax


def attention(
    build: Build,
    x: Value,
    around: Around,
    spec: QuantSpec | None,
    *,
    context_before_gate: bool = False,
    past: Past | None = None,
) -> tuple[Value, Past | None]:
    """`nn.attention.MultiHeadAttention` of rows: [N, D] -> [N, D], and the keys and values now."""
    graph, sites, config = build.graph, build.sites, build.config
    with graph.scope("attention"):
        root = math.sqrt(config.hidden_size // config.num_heads)
        q = _heads(build, x, "query", around, spec, divisor=root)
        keys = KEYS if past is None else QUERIES
        k, v = _heads(build, x, "key", around, spec, keys), _heads(build, x, "value", around, spec)
        present, own = None, v
        if past is not None:
            k, v = _extended(build, k, past.key, "key"), _extended(build, v, past.value, "value")
            present = Past(k.name, v.name)
            k = _moved(build, k, "key", [0, 1, 3, 2])
        scores = sites.activation(_product(build, q, k, "scores", spec), "scores", spec)
        probs = sites.activation(_probs(build, scores, around), "probs", spec)
        context = _product(build, probs, v, "context", spec)
        merged = _gated(build, context, x, own, around, spec, context_before_gate)
        return dense(build, merged, "output", spec), present


def _heads(
    build: Build,
    x: Value,
    name: str,
    around: Around,
    spec: QuantSpec | None,
    order: list[int] = QUERIES,
    divisor: float = 1.0,
) -> Value:
    """A projection as [B, H, T, K] or in the order of keys, divided by a number."""
    normed = build.config.qk_norm and name != "value"
    norm = functools.partial(_head_norm, build, f"{name}_norm", spec) if normed else None
    y = dense(build, x, name, spec, norm)
    with build.graph.scope(name):
        split = Value(build.graph.node("Reshape", y.name, around.heads_shape), y.codes)
    return _moved(build, split, name, order, divisor)


def _head_norm(build: Build, name: str, spec: QuantSpec | None, graph: Graph, x: str) -> str:
    """`nn.head_norm.HeadNorm` of rows [N, D], with the scale on its grid but in floating point."""
    config, sites = build.config, build.sites
    path = f"{graph.path.rpartition('/')[0]}/{name}"  # beside the projection
    with graph.at(path):
        scale = sites.rounded(f"{path}/weight", "scale", spec and spec.for_layer_norm())
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        split = graph.node("Reshape", x, graph.constant([-1, heads, size], np.int64))
        normed = rms_norm(graph, split, graph.array("scale", scale), EPSILON)
        return graph.node("Reshape", normed, graph.constant([-1, config.hidden_size], np.int64))


def _moved(build: Build, x: Value, name: str, order: list[int], divisor: float = 1.0) -> Value:
    """Axes in another order, on the same grid; the scale of codes takes a divisor in."""
    graph = build.graph
    with graph.scope(name, "heads"):
        moved = graph.node("Transpose", x.name, perm=order)
        if x.codes is None and divisor != 1.0:
            moved = graph.node("Div", moved, graph.constant(divisor))
        return build.sites.again(moved, x.codes, divisor=divisor)


def _extended(build: Build, new: Value, past: str, name: str) -> Value:
    """Behind those of the past: [B, H, P + T, K]."""
    graph = build.graph
    with graph.scope(name, "present"):
        return build.sites.again(graph.node("Concat", past, new.name, axis=2), new.codes)


def _product(build: Build, x: Value, y: Value, name: str, spec: QuantSpec | None) -> str:
    with build.graph.scope(name), build.graph.because(float_reason(spec, x, y)):
        return build.graph.node("MatMul", x.name, y.name)


def _probs(build: Build, on_grid: Value, around: Around) -> str:
    """`nn.softmax.clipped_softmax` with a mask: float [B, H, T, S]."""
    graph, softmax, scores = build.graph, check_softmax(build.config.softmax), on_grid.name
    with graph.scope("softmax"), graph.because(SOFTMAX):
        if around.bias is not None:
            scores = graph.node("Add", scores, around.bias)
        if softmax.sink != "none":
            probs = _with_sink(build, scores, softmax)
        elif around.bias is None and on_grid.codes is not None:
            probs = _softmax_of_rows(graph, scores)
        else:
            probs = graph.node("Softmax", scores, axis=-1)
        if around.factor is not None:
            probs = graph.node("Mul", probs, around.factor)
        if softmax.gamma or around.gamma is not None:
            probs = graph.node("Add", probs, around.gamma or graph.constant(softmax.gamma))
        if (softmax.gamma, softmax.zeta, softmax.alpha) != (0.0, 1.0, 0.0):
            probs = graph.node("Clip", probs, graph.constant(0.0), graph.constant(1.0))
        return probs


def _softmax_of_rows(graph: Graph, scores: str) -> str:
    """Softmax of a matrix: between a DequantizeLinear and a QuantizeLinear alone, ONNX Runtime
    would take its QLinearSoftmax, which rounds down, and took twice as long when we measured it."""
    shape = graph.node("Shape", scores)
    rows = graph.node("Softmax", graph.node("Flatten", scores, axis=3), axis=-1)
    return graph.node("Reshape", rows, shape)


def _with_sink(build: Build, scores: str, softmax: SoftmaxConfig) -> str:
    """Softmax with one more logit for each head, that has no key."""
    graph = build.graph
    heads = build.config.num_heads
    learned = None
    if softmax.sink == "learned":
        learned = np.asarray(build.sites.module(f"{graph.path.removesuffix('/softmax')}")["sink"])
    logits = np.zeros((heads,), np.float32) if learned is None else learned
    sink = graph.array("sink", logits.astype(np.float32)[:, None, None])
    highest = graph.node("ReduceMax", scores, graph.constant([-1], np.int64), keepdims=1)
    highest = graph.node("Max", highest, sink)
    exps = graph.node("Exp", graph.node("Sub", scores, highest))
    total = graph.node("ReduceSum", exps, graph.constant([-1], np.int64), keepdims=1)
    rest = graph.node("Exp", graph.node("Sub", sink, highest))
    return graph.node("Div", exps, graph.node("Add", total, rest))


def _gated(
    build: Build,
    context: str,
    x: Value,
    v: Value,
    around: Around,
    spec: QuantSpec | None,
    before: bool,
) -> Value:
    """The context times the gate, heads merged, on the grids of the scheme: [N, D]."""
    graph, sites, config = build.graph, build.sites, build.config
    on_grid = Value(context)
    if config.gate is None or before:
        on_grid = sites.activation(context, "context", spec)
    with graph.scope("context"):
        merged = graph.node("Transpose", on_grid.name, perm=[0, 2, 1, 3])
        if config.gate is not None:
            factor = gate(build, x, v, around)
            with graph.because(GATE):
                merged = graph.node("Mul", merged, factor)
        shape = graph.constant([-1, config.hidden_size], np.int64)
        merged = graph.node("Reshape", merged, shape)
        if config.gate is None:
            return sites.again(merged, on_grid.codes)
    if not before:
        return sites.activation(merged, "context", spec)
    return sites.activation(merged, "gated_context", spec if spec and spec.gated_context else None)
