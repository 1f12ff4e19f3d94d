"""Every family with every norm: parameters, integers, SmoothQuant, ONNX, and who refuses."""

import jax
import numpy as np
import pytest
from flax import traverse_util

import quantizable_flax as qf
from quantizable_flax import QuantSpec, UserError
from quantizable_flax.evaluation.outliers import outlier_sites, published_stats
from quantizable_flax.models.build import build_model
from quantizable_flax.ptq.smoothquant import smooth
from quantizable_flax.quantization.sites import STATS
from tests.onnx.case import float_batch, worst
from tests.onnx.case import make_case as make_onnx_case
from tests.ptq.int8_case import check_agreement, inputs_of, make_case
from tests.small import small_batch, small_config, small_model

RMS = ("rms_norm", "rms_norm_single")
MODELS = [("bert", {}), ("opt", {}), ("opt", {"pre_layer_norm": False}), ("vit", {})]


@pytest.mark.parametrize(
    "norm", [pytest.param("rms_norm", marks=pytest.mark.slow), "rms_norm_single"]
)
@pytest.mark.parametrize(("family", "model"), MODELS)
def test_it_has_no_biases_and_the_sites_of_before(family, model, norm):
    built, params = small_model(family, norm=norm, **model)
    usual, _ = small_model(family, **model)
    flat = traverse_util.flatten_dict(params, sep="/")
    scales = {path: x.shape for path, x in flat.items() if path.endswith("layer_norm/scale")}
    assert set(scales.values()) == {(1,) if norm == "rms_norm_single" else (32,)}
    assert not any(path.endswith("norm/bias") for path in flat)
    _, found = built.apply({"params": params}, small_batch(family), method="loss", mutable=[STATS])
    names = published_stats(found[STATS], outlier_sites(built))
    assert names
    assert outlier_sites(built) == outlier_sites(usual)


@pytest.mark.parametrize(
    "norm", [pytest.param("rms_norm", marks=pytest.mark.slow), "rms_norm_single"]
)
@pytest.mark.parametrize(("family", "model"), MODELS)
def test_integers_are_the_simulation(family, model, norm):
    case = make_case(family, QuantSpec(head=True), norm=norm, **model)
    found = check_agreement(case, *inputs_of(family))
    floats = case.in_float(*inputs_of(family))
    assert 0 < np.abs(found - floats).max() < 0.3 * np.abs(floats).max()


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_smoothquant_folds_into_an_rms_norm(family, model):
    built, params = small_model(family, {"gate": "linear"}, norm="rms_norm", num_layers=2, **model)
    batch = small_batch(family)
    inputs = [x for key, x in batch.items() if key != "labels"]
    smoothed = smooth(built, params, [batch])
    run = jax.jit(lambda params: built.apply({"params": params}, *inputs))
    assert worst(run(smoothed), run(params)) < 1e-5
    flat, before = (traverse_util.flatten_dict(p, sep="/") for p in (smoothed, params))
    assert not np.array_equal(flat["layer_0/ffn_in/kernel"], before["layer_0/ffn_in/kernel"])


def test_smoothquant_refuses_a_single_scale():
    built, params = small_model("vit", norm="rms_norm_single")
    with pytest.raises(UserError, match="one scale for all: leave \\+smooth out"):
        smooth(built, params, [small_batch("vit")])


@pytest.mark.parametrize("norm", RMS)
@pytest.mark.parametrize(("family", "model"), MODELS)
def test_onnx_computes_it(family, model, norm):
    case = make_onnx_case(family, norm=norm, **model)
    batch = float_batch(family, case.model)
    assert worst(case.theirs(batch), case.ours(batch)) < 1e-5


@pytest.mark.parametrize("norm", RMS)
def test_onnx_puts_its_scale_and_its_output_on_their_grids(norm):
    case = make_onnx_case("opt", spec=QuantSpec(), norm=norm)
    batch = float_batch("opt", case.model)
    # A code moves where the last bit of a root differs.
    assert worst(case.theirs(batch), case.ours(batch)) < 2e-2


@pytest.mark.parametrize("norm", RMS)
def test_other_formats_refuse_it(tmp_path, norm):
    config = small_config("bert", norm=norm)
    built, params = small_model("bert", norm=norm)
    for call in (
        lambda: qf.to_state_dict(params, config),
        lambda: qf.from_state_dict({}, config),
        lambda: qf.to_huggingface(built, params, str(tmp_path / "folder")),
    ):
        with pytest.raises(UserError, match=f"model.norm={norm}: use the checkpoint of the run"):
            call()
    assert not (tmp_path / "folder").exists()


def test_another_norm_is_named():
    with pytest.raises(
        UserError, match=r"model\.norm must be one of layer_norm, rms_norm, rms_norm_single"
    ):
        build_model(small_config("opt", norm="rmsnorm"))
