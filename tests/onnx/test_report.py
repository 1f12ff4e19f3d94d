"""What stays in floating point: each node of the graph is on integers, or says why not."""

import onnx
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.onnx.report import MOVES, PRODUCTS
from tests.onnx.case import make_case

FLOAT = onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("family", "attention", "spec"),
    [
        ("bert", {"gate": "mlp", "softmax": "clipped", "gamma": -0.1}, QuantSpec()),
        ("opt", {"gate": "linear", "sink": "learned"}, QuantSpec(gated_context=False)),
        ("vit", {}, QuantSpec(weight_per_channel=True, head=True, float_sites=".*/query/weight")),
        ("bert", {"gate": "linear"}, QuantSpec(activation_bits=4)),
    ],
)
def test_every_node_in_floating_point_says_why(family, attention, spec):
    exported = make_case(family, attention, spec).exported
    graph, report = exported.model.graph, exported.report
    kinds = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
    made_by = {node.output[0]: node for node in graph.node}
    told = {name: why for name, _, why in report.floats}
    assert all(told.values())
    for node in graph.node:
        (name,) = node.output
        if node.op_type in MOVES or kinds.get(name, FLOAT) != FLOAT or name in told:
            continue
        operators = [made_by[x].op_type for x in node.input if x in made_by]
        if node.op_type in PRODUCTS:
            assert name in report.integers
            assert operators == ["DequantizeLinear"] * 2
        elif name.startswith("mask"):
            assert node.op_type in ("ReduceMax", "Mul", "Where")
        else:
            assert node.op_type == "Div", name


def test_reasons_are_those_of_the_scheme():
    options = {"gate": "linear"}, QuantSpec(float_sites=".*/probs", weight_per_channel=True)
    report = make_case("bert", *options).exported.report
    told = {name: why for name, _, why in report.floats}
    assert "quant.coverage" in told["mlm_head/decoder/Gemm"]
    assert "on no grid" in told["layer_0/attention/context/MatMul"]
    assert "gates stay" in told["layer_0/attention/context/gate/Gemm"]
    assert "softmax" in told["layer_0/attention/softmax/Softmax"]
    assert "LayerNorm" in told["layer_0/attention_layer_norm/LayerNormalization"]
    assert "scale of its own" in told["embeddings/word/weight/Mul"]
    assert len(report.integers) == 7
    assert len(report.lines()) == len(set(told.values()))
    written = report.as_json()
    assert written["quant"]["float_sites"] == ".*/probs"
    assert written["float_nodes"][0].keys() == {"node", "operator", "why"}


def test_in_floating_point_nothing_is_asked():
    report = make_case("vit").exported.report
    assert report.spec is None
    assert not report.integers
    assert {why for *_, why in report.floats} == {"nothing is quantized"}
