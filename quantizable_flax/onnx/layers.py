"""Dense, Embed, norms and residual sums as nodes; tensors are rows, [N, D] for [B, T, D]."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.onnx.graph import Graph
from quantizable_flax.onnx.grids import Sites, Value
from quantizable_flax.quantization.spec import QuantSpec

Activation = Callable[[Graph, str], str]


class Build(NamedTuple):
    """What the writers of all families share.

    Attributes:
      graph: the nodes so far.
      sites: grids of the model's sites, and its parameters.
      config: of the model.
    """

    graph: Graph
    sites: Sites
    config: Any

    def module(self) -> Mapping[str, Any]:
        """The parameters of the module that the graph's scope names."""
        return self.sites.module(self.graph.path)


def gelu(graph: Graph, x: str) -> str:
    """With the error function."""
    return graph.node("Gelu", x)


def relu(graph: Graph, x: str) -> str:
    """max(x, 0)."""
    return graph.node("Relu", x)


def tanh(graph: Graph, x: str) -> str:
    """Of BERT's pooler."""
    return graph.node("Tanh", x)


def dense(
    build: Build, x: Value, name: str, spec: QuantSpec | None, activation: Activation | None = None
) -> Value:
    """`nn.layers.Dense` of rows: [N, D] -> [N, F]."""
    graph, sites = build.graph, build.sites
    with graph.scope(name):
        weight = sites.weight_codes(f"{graph.path}/weight", "kernel", spec)
        module = build.module()
        bias = np.asarray(module["bias"], np.float32) if "bias" in module else None
        if weight is None:
            kernel = Value(graph.array("kernel", np.asarray(module["kernel"], np.float32)))
        else:
            with graph.scope("weight"):
                kernel = sites.weight(*weight, axis=1)
        y = product(build, x, kernel, bias, spec)
        if activation is not None:
            with graph.because(
                "an activation function is in float32, between a product and a grid"
            ):
                y = activation(graph, y)
        return sites.activation(y, "output", spec)


def product(
    build: Build,
    x: Value,
    kernel: Value,
    bias: np.ndarray | None,
    spec: QuantSpec | None,
    *,
    transposed: bool = False,
) -> str:
    """`x @ kernel + bias`: [N, D] -> [N, F], the kernel [D, F], or [F, D] transposed.

    A bias of a product of integers is added behind it, in floating point as in the simulation.
    Inside of the Gemm, ONNX Runtime's integer kernel would take it only as integers in steps of
    `s_x s_w`, and that rounding moves codes.
    """
    graph = build.graph
    attributes: dict[str, Any] = {"transB": 1} if transposed else {}
    reason = float_reason(spec, x, kernel)
    names = () if bias is None else (graph.array("bias", bias),)
    if reason is not None:
        with graph.because(reason):
            return graph.node("Gemm", x.name, kernel.name, *names, **attributes)
    y = graph.node("Gemm", x.name, kernel.name, **attributes)
    with graph.because("a bias is float32, as in the simulation"):
        return graph.node("Add", y, *names) if names else y


def float_reason(spec: QuantSpec | None, *operands: Value) -> str | None:
    """Why a product is of floats; None where all operands are codes of at most 8 bits."""
    if spec is None:
        return "quant.coverage leaves it in floating point"
    if any(operand.codes is None for operand in operands):
        return "the scheme puts one of its operands on no grid"
    if any(operand.codes is not None and operand.codes.wide for operand in operands):
        return "one of its operands has more than 8 bits, which no integer kernel multiplies"
    return None


def layer_norm(build: Build, x: Value, name: str, spec: QuantSpec | None) -> Value:
    """`nn.norm.Norm` over the last axis."""
    graph, sites, epsilon = build.graph, build.sites, build.config.layer_norm_eps
    with graph.scope(name):
        module = build.module()
        # On its grid of 8 bits, but in floating point: it is small, and multiplies floats.
        scale = sites.rounded(f"{graph.path}/weight", "scale", spec)
        with graph.because("LayerNorm or RMSNorm is in float32, between the grids around it"):
            if build.config.norm == "layer_norm":
                names = graph.array("scale", scale), graph.array("bias", np.asarray(module["bias"]))
                y = graph.node("LayerNormalization", x.name, *names, axis=-1, epsilon=epsilon)
            else:
                y = rms_norm(graph, x.name, graph.array("scale", scale), epsilon)
        return sites.activation(y, "output", spec)


def added(graph: Graph, x: Value, y: Value) -> str:
    """`x + y`; of codes not by the integer addition that ONNX Runtime would make of an Add.

    It knows no integer `Sum`. Its QLinearAdd keeps five digits of the sum in steps of the next
    grid, and one of the pairs of codes, in a thousand places perhaps, then lies on the other side
    of the middle between two codes.
    """
    on_grids = x.codes is not None and y.codes is not None
    reason = "a sum of two grids is in float32, as in the simulation" if on_grids else None
    with graph.because(reason):
        return graph.node("Sum" if on_grids else "Add", x.name, y.name)


def rms_norm(graph: Graph, x: str, scale: str, epsilon: float) -> str:
    """Over the last axis, of its parts: the operator RMSNormalization is of opset 23."""
    square = graph.node("Mul", x, x)
    mean = graph.node("ReduceMean", square, graph.constant([-1], np.int64), keepdims=1)
    root = graph.node("Sqrt", graph.node("Add", mean, graph.constant(epsilon)))
    return graph.node("Mul", graph.node("Div", x, root), scale)


def as_rows(build: Build, x: Value, width: int) -> Value:
    """[..., D] -> [N, D], on the grid that x is on."""
    graph = build.graph
    rows = graph.node("Reshape", x.name, graph.constant([-1, width], np.int64))
    return build.sites.again(rows, x.codes)


def spec_of_norm(config: Any, *, final: bool = False) -> QuantSpec | None:
    """The scheme of a LayerNorm, `final` for the one before the head."""
    return config.quant and config.quant.for_layer_norm(final=final)


def residual(build: Build, block: str, x: Value, y: Value, spec: QuantSpec | None) -> Value:
    """`models.transformer.residual` in evaluation."""
    graph = build.graph
    scale = build.sites.module(f"{graph.path}/{block}_residual_scale")
    with graph.scope(f"{block}_residual"):
        if scale:
            with graph.because("the factor that SmoothQuant left on this branch is on no grid"):
                factor = graph.array("scale", np.asarray(scale["scale"]))
                x = Value(graph.node("Mul", x.name, factor))
        with graph.because("a residual sum of values that are on no grid"):
            total = added(graph, x, y)
    return build.sites.activation(total, f"{block}_residual", spec)
