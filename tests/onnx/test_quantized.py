"""W8A8 exports against the simulation: codes, logits, kernels, sizes."""

import jax
import numpy as np
import onnx
import pytest
from flax import traverse_util
from onnx import numpy_helper

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import with_quant
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
ATTENTION = {"vanilla": {}, "clipped": CLIPPED, "gated": {"gate": "linear"}}


def check(case: Case, tolerance: float = 0.02):
    """Equal predictions; the last bits of a float may move single codes on another machine."""
    batch = float_batch(case.family, case.model)
    for given in (batch, shorter(batch)):
        ours, theirs = case.ours(given), case.theirs(given)
        assert worst(theirs, ours) < tolerance
        assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) > 0.95  # of tens of predictions


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_logits_are_those_of_the_simulation(family, setting, attention):
    check(make_case(family, ATTENTION[attention], SETTINGS[setting]))


@pytest.mark.parametrize(
    ("family", "spec", "options"),
    [
        ("bert", QuantSpec(activation_symmetric=True, head=True), {"head": "classifier"}),
        ("bert", QuantSpec(weight_bits=4, activation_bits=6), {}),
        ("bert", QuantSpec(float_sites=".*/(probs|query/output)", head=True), {"head": "pooler"}),
        ("opt", QuantSpec(weight_per_channel=True), {"embed_size": 16}),
        ("opt", QuantSpec(gated_context=False, activation_bits=None), {"pre_layer_norm": False}),
        ("vit", QuantSpec(weight_bits=None), {"num_registers": 1, "distillation": "head"}),
    ],
)
def test_so_are_those_of_other_schemes(family, spec, options):
    check(make_case(family, CLIPPED, spec, **options))


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
    case = make_case(family, CLIPPED, QuantSpec(), num_layers=2)
    batch = float_batch(family, case.model)
    ours, model = site_codes(case, batch), case.exported.model
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
    ("family", "attention", "spec", "expected"),
    [
        ("bert", {}, QuantSpec(), {"QGemm": 12, "QLinearMatMul": 4, "Gemm": 2}),
        ("bert", {}, SETTINGS["channel"], {"QGemm": 14, "QLinearMatMul": 4}),
        # The gate multiplies the context in floating point, before that is on a grid.
        ("bert", {"gate": "linear"}, SETTINGS["channel"],
         {"QGemm": 14, "QLinearMatMul": 2, "MatMulIntegerToFloat": 2, "Gemm": 2}),
        ("opt", {"gate": "linear"}, QuantSpec(), {"QGemm": 12, "QLinearMatMul": 4, "Gemm": 3}),
        ("opt", CLIPPED, SETTINGS["channel"], {"QGemm": 13, "QLinearMatMul": 4}),
        ("vit", {}, QuantSpec(head=True), {"QGemm": 14, "QLinearMatMul": 4}),
        ("vit", CLIPPED, SETTINGS["channel"], {"QGemm": 14, "QLinearMatMul": 4}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opset", [20, 24])
def test_onnx_runtime_takes_integer_kernels(family, attention, spec, expected, opset, tmp_path):
    case = make_case(family, attention, spec, opset=opset, num_layers=2)
    found = kernels(case.exported.model, tmp_path)
    products = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "Gemm", "MatMul", "FusedMatMul")
    assert {name: found[name] for name in products if found[name]} == expected
    assert found["QLinearSoftmax"] == 0
    assert found["QLinearAdd"] >= 4
    report = case.exported.report
    integers = sum(count for name, count in expected.items() if name not in ("Gemm", "MatMul"))
    assert (len(report.integers), len(report.float_products)) == (integers, expected.get("Gemm", 0))


def test_weights_are_integers_and_kept_once():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512}
    spec = QuantSpec(head=True)
    small = make_case("bert", {}, spec, **sizes).exported.model
    large = make_case("bert", {}, **sizes).exported.model
    assert small.ByteSize() < 0.27 * large.ByteSize()
    arrays = {x.name: numpy_helper.to_array(x) for x in small.graph.initializer}
    kernel = arrays["layer_0/attention/query/weight/codes"]
    assert (kernel.dtype, np.abs(kernel).max()) == (np.int8, 127)
    # The decoder multiplies by the table that the lookup reads.
    tables = [name for name, array in arrays.items() if 512 in array.shape and array.ndim > 1]
    assert "embeddings/word/weight/codes" in tables
    assert not [name for name in tables if "decoder" in name]
    assert all(array.size <= 512 for array in arrays.values() if array.dtype == np.float32)
