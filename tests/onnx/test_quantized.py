"""W8A8 exports against the simulation: codes, logits, kernels, sizes."""

import functools

import jax
import numpy as np
import onnx
import pytest
from flax import traverse_util
from onnx import numpy_helper

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import with_quant
from quantizable_flax.onnx.graph import Graph
from quantizable_flax.onnx.grids import Codes, Value
from quantizable_flax.onnx.layers import added
from quantizable_flax.onnx.opsets import LEAST, MOST
from quantizable_flax.onnx.write import to_onnx
from quantizable_flax.ptq.calibrate import calibrate, with_grids
from quantizable_flax.ptq.smoothquant import smooth
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.tensor import Quantized
from tests.onnx.case import (
    Case,
    arguments,
    feeds,
    float_batch,
    kernels,
    make_case,
    of_params,
    session,
    shorter,
    worst,
)
from tests.small import small_model

CLIPPED = {"softmax": "clipped", "gamma": -0.03}
SETTINGS = {
    "tensor": QuantSpec(),
    "channel": QuantSpec(weight_per_channel=True, head=True),
}
BY_ROW = {
    **{"softmax": "clipped", "alpha": 0.4, "length_normalised": True},
    **{"gate": "value", "qk_norm": True},
}
ATTENTION = {
    "vanilla": {},
    "clipped": CLIPPED,
    "gated": {"gate": "linear"},
    "both": {**CLIPPED, "gate": "linear"},
}


def check(case: Case):
    """Equal up to a few codes: here there is mostly no difference at all.

    Where the last bit of a float moves a code of one side, a random model makes much of it, and
    another machine may have others: the promise of 2 % is tested on trained models.
    """
    batch = float_batch(case.family, case.model)
    for given in (batch, shorter(batch)):
        ours, theirs = case.ours(given), case.theirs(given)
        assert worst(theirs, ours) < 0.05
        assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) > 0.9  # of few predictions


@functools.cache
def known(family: str, attention: str, setting: str) -> Case:
    """One for all tests of it."""
    return make_case(family, ATTENTION[attention], SETTINGS[setting])


@pytest.mark.parametrize(
    ("attention", "setting"),
    [
        # Each alone is in the last of them.
        pytest.param("vanilla", "tensor", marks=pytest.mark.slow),
        ("clipped", "tensor"),
        pytest.param("gated", "tensor", marks=pytest.mark.slow),
        ("both", "channel"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_logits_are_those_of_the_simulation(family, attention, setting):
    check(known(family, attention, setting))


@pytest.mark.parametrize(
    ("family", "spec", "options"),
    [
        pytest.param(
            *("bert", QuantSpec(activation_symmetric=True, head=True), {"head": "none"}),
            marks=pytest.mark.slow,
        ),
        ("bert", QuantSpec(head=True), {"attention": BY_ROW, "num_registers": 2}),
        ("opt", QuantSpec(), {"attention": {"gate": "elementwise", "qk_norm": True}}),
        ("vit", QuantSpec(), {"attention": BY_ROW}),
        pytest.param(
            "bert", QuantSpec(weight_bits=4, activation_bits=6), {}, marks=pytest.mark.slow
        ),
        ("bert", QuantSpec(float_sites=".*/(probs|query/output)", head=True), {"head": "pooler"}),
        pytest.param(
            "opt", QuantSpec(weight_per_channel=True), {"embed_size": 16}, marks=pytest.mark.slow
        ),
        ("opt", QuantSpec(gated_context=False, activation_bits=None), {"pre_layer_norm": False}),
        ("vit", QuantSpec(weight_bits=None), {"num_registers": 1, "distillation": "head"}),
    ],
)
def test_so_are_those_of_other_schemes(family, spec, options):
    check(make_case(family, **{"attention": CLIPPED, "spec": spec, **options}))


@pytest.mark.parametrize("family", ["opt", "vit"])
def test_more_bits_by_a_later_opset(family):
    spec = QuantSpec(final_layer_norm_bits=16, site_bits=((".*/scores", 12),))
    case = make_case(family, {}, spec, opset=21)
    check(case)
    widths = {array.dtype.itemsize for array in zero_points(case.exported.model).values()}
    assert widths == {1, 2}


def test_learned_grids_and_a_smoothed_model():
    model, params = small_model("bert")
    quantized, batch = with_quant(model, QuantSpec()), float_batch("bert", model)
    ranges = calibrate(quantized, params, [batch])
    grids = with_grids(quantized, params, ranges)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1.3 if path[-1].key == "zero" else x, grids
    )
    check(of_params("bert", model, moved, QuantSpec()))
    check(of_params("bert", model, smooth(model, params, [batch], 0.5), QuantSpec()))


@pytest.mark.parametrize("all_off", [True, False], ids=["as written", "optimized"])
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_codes_are_those_of_every_site(family, all_off):
    case = known(family, "clipped", "tensor")
    batch, model = float_batch(family, case.model), onnx.ModelProto()
    ours = site_codes(case, batch)
    model.CopyFrom(case.exported.model)
    found = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    names = [name for name in found if name.removesuffix("/codes") in ours]
    assert {name.removesuffix("/codes") for name in names} == set(ours)
    for name in names:
        kind = onnx.TensorProto.UINT8
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    given = feeds(family, case.model.config, batch)
    theirs = session(model, all_off=all_off).run(names, given)
    points = zero_points(model)
    for name, codes in zip(names, theirs, strict=True):
        expected = ours[name.removesuffix("/codes")]
        centred = codes.astype(np.int32) - points[name].astype(np.int32)
        if name.endswith("context/codes"):
            centred = centred.swapaxes(1, 2)  # the graph's come before heads are merged
        # On the machine that these were written on, no code differs.
        assert np.mean(centred.ravel() != expected.ravel()) < 0.01, name
        assert np.abs(centred.ravel() - expected.ravel()).max() <= 2, name


def site_codes(case: Case, batch) -> dict[str, np.ndarray]:
    """Of the simulation: each site's codes less the zero point."""

    @jax.jit
    def forward(variables, *inputs):
        _, found = case.model.apply(
            variables,
            *inputs,
            capture_intermediates=lambda module, _: isinstance(module, Site),
            mutable=["intermediates"],
        )
        return found["intermediates"]

    flat = traverse_util.flatten_dict(forward(case.variables, *arguments(batch)))
    return {
        "/".join(path[:-1]): np.asarray(x.centred(), np.int32)
        for path, (x,) in flat.items()
        if isinstance(x, Quantized)
    }


def zero_points(model) -> dict[str, np.ndarray]:
    """The zero point of each QuantizeLinear, by its output."""
    arrays = {x.name: x for x in model.graph.initializer}
    return {
        node.output[0]: numpy_helper.to_array(arrays[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize(
    ("family", "attention", "setting", "expected"),
    [
        ("bert", "vanilla", "tensor", {"QGemm": 6, "QLinearMatMul": 2, "Gemm": 2}),
        # The gate multiplies the context in floating point, before that is on a grid.
        ("bert", "both", "channel",
         {"QGemm": 8, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1, "Gemm": 1}),
        ("opt", "gated", "tensor", {"QGemm": 6, "QLinearMatMul": 2, "Gemm": 2}),
        ("opt", "both", "channel", {"QGemm": 7, "QLinearMatMul": 2, "Gemm": 1}),
        ("vit", "vanilla", "tensor", {"QGemm": 7, "QLinearMatMul": 2, "Gemm": 1}),
        ("vit", "clipped", "tensor", {"QGemm": 7, "QLinearMatMul": 2, "Gemm": 1}),
    ],
)  # fmt: skip
def test_onnx_runtime_takes_integer_kernels(family, attention, setting, expected, tmp_path):
    case = known(family, attention, setting)
    params, ranges = case.variables["params"], case.variables["ranges"]
    products = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "Gemm", "MatMul", "FusedMatMul")
    for opset in (LEAST, MOST):
        exported = to_onnx(case.model, params, ranges, opset=opset)
        found = kernels(exported.model, tmp_path)
        assert {name: found[name] for name in products if found[name]} == expected
        assert found["QLinearSoftmax"] == 0
        assert found["QLinearAdd"] == 0  # see `layers.added`
    integers = sum(count for name, count in expected.items() if name != "Gemm")
    assert len(exported.report.integers) == integers
    assert len(exported.report.float_products) == expected["Gemm"]


def test_sums_of_grids_are_those_of_float32(tmp_path):
    """All pairs of codes, on grids of a trained model where some lie next to a middle."""
    scales = np.float32([0.00208558, 0.01265717, 0.01270504])
    zeros = np.uint8([130, 134, 133])
    codes = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    x, y = (
        (q - np.float32(zero)) * scale for q, scale, zero in zip(codes, scales, zeros, strict=False)
    )
    expected = np.clip(np.rint((x + y) / scales[2]) + zeros[2], 0, 255)
    different = {}
    for op in ("Sum", "Add"):
        graph = Graph(LEAST)
        terms = []
        for name, scale, zero in zip("xy", scales, zeros, strict=False):
            given = graph.input(name, "uint8", [256, 256])
            grid = graph.constant(scale), graph.constant(zero, np.uint8)
            value = graph.node("DequantizeLinear", given, *grid)
            terms.append(Value(value, Codes(given, scale, zero)))
        total = added(graph, *terms) if op == "Sum" else graph.node(op, *(t.name for t in terms))
        grid = graph.constant(scales[2]), graph.constant(zeros[2], np.uint8)
        graph.output("out", graph.node("QuantizeLinear", total, *grid), "uint8", [256, 256])
        given = {name: q.astype(np.uint8) for name, q in zip("xy", codes, strict=True)}
        (found,) = session(graph.finish()).run(None, given)
        different[op] = int((found != expected).sum())
    assert different["Sum"] == 0
    assert different["Add"] > 0  # why it is not an Add: QLinearAdd


def test_weights_are_integers_and_kept_once():
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1025}
    spec = QuantSpec(head=True)
    small = make_case("bert", {}, spec, **sizes).exported.model
    large = make_case("bert", {}, **sizes).exported.model
    assert small.ByteSize() < 0.27 * large.ByteSize()
    arrays = {x.name: numpy_helper.to_array(x) for x in small.graph.initializer}
    kernel = arrays["layer_0/attention/query/weight/codes"]
    assert (kernel.dtype, np.abs(kernel).max()) == (np.int8, 127)
    # The decoder multiplies by the table that the lookup reads.
    tables = [name for name, array in arrays.items() if 1025 in array.shape and array.ndim > 1]
    assert tables == ["embeddings/word/weight/codes"]
    assert all(array.size <= 1025 for array in arrays.values() if array.dtype == np.float32)
