"""Rotated grids: the matrix, the formula at a site and in a product, the function, who refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import traverse_util

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.models.build import build_model, with_quant
from quantizable_flax.nn.layers import Dense
from quantizable_flax.onnx.write import to_onnx
from quantizable_flax.ptq.calibrate import calibrate, with_grids
from quantizable_flax.ptq.int8 import count_products
from quantizable_flax.ptq.sensitivity import sensitivity
from quantizable_flax.ptq.settings import check_spec, site_names
from quantizable_flax.quantization import sites
from quantizable_flax.quantization.hadamard import rotate, rotate_back
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.spec import HADAMARD
from quantizable_flax.quantization.tensor import Quantized
from tests.ptq.int8_case import check_agreement, inputs_of, make_case
from tests.ptq.test_smoothquant import built, error, logits, planted
from tests.small import small_batch, small_config, small_model

ROTATED = QuantSpec(hadamard=HADAMARD)
MODELS = [
    ("bert", {}),
    pytest.param("opt", {}, marks=pytest.mark.slow),
    ("opt", {"pre_layer_norm": False}),
    ("vit", {}),
]


def matrix(size: int) -> np.ndarray:
    """What `rotate` multiplies rows by, in float64."""
    return np.float64(rotate(jnp.eye(size, dtype=jnp.float32), -1))


@pytest.mark.parametrize("size", [2, 16, 128, 12, 20, 24, 96, 160, 768])
def test_the_matrix_is_hadamards_with_signs(size):
    found = matrix(size)
    np.testing.assert_allclose(found @ found.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(found), 1 / np.sqrt(size), rtol=1e-5)
    assert size < 12 or 0.2 < np.mean(found[:, 0] > 0) < 0.8  # the first column is no mean
    if size & (size - 1) == 0:
        unsigned = np.sign(found) * np.sign(found[:, :1])
        np.testing.assert_array_equal(unsigned, scipy.linalg.hadamard(size))


@pytest.mark.parametrize("axis", [-1, -2])
def test_it_turns_back(axis):
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, 24, 32)))
    turned = rotate(x, axis)
    np.testing.assert_allclose(rotate_back(turned, axis), x, atol=1e-6)
    expected = np.moveaxis(np.moveaxis(np.float64(x), axis, -1) @ matrix(x.shape[axis]), -1, axis)
    np.testing.assert_allclose(turned, expected, atol=1e-6)


@pytest.mark.parametrize("size", [14, 36, 100])
def test_widths_without_a_matrix_are_named(size):
    with pytest.raises(UserError, match=rf"needs a width of 2\^k, .*found {size}: leave"):
        rotate(jnp.ones((2, size)), -1)


def on_grid(x: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Rounded to the grid of x's own range, in float64."""
    if symmetric:
        step = np.abs(x).max() / (2 ** (bits - 1) - 1)
        return step * np.round(x / step)
    step = (x.max() - x.min()) / (2**bits - 1)
    zero = np.round(-x.min() / step)
    return step * (np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero)


def test_a_site_rounds_in_the_rotated_basis_and_stands_for_x():
    x = np.random.default_rng(0).normal(size=(2, 5, 48))
    x[..., 7] += 40.0
    site = Site(QuantSpec(activation_bits=6, hadamard=".*"), name="site")
    found, _ = site.apply({}, jnp.float32(x), mutable=["ranges"])
    h = matrix(48)
    np.testing.assert_allclose(found.values(), on_grid(x @ h, 6, False) @ h.T, atol=1e-4)
    plain, _ = Site(QuantSpec(activation_bits=6)).apply({}, jnp.float32(x), mutable=["ranges"])
    # An outlier of 40 among 48 channels is one of 6 beside noise of 3, on both sides of 0.
    assert error(found.values(), x) < 0.5 * error(plain.values(), x)


@pytest.mark.parametrize("ranges", ["static", "token"])
def test_a_product_is_of_rotated_codes(ranges):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 32)), rng.normal(size=(32, 8))
    spec = QuantSpec(4, 4, hadamard=".*", float_sites="dense/output", activation_ranges=ranges)

    class Layer(Dense):
        pass

    def run(x):
        return Layer(8, quant=spec, name="dense")(Site(spec, name="site")(x))

    found, _ = _apply(run, {"dense": {"kernel": w, "bias": np.zeros(8)}}, x)
    h = matrix(32)
    rows = [(x @ h)] if ranges == "static" else np.split((x @ h).reshape(6, 32), 6)
    rows = [r if ranges == "static" else _with_zero(r) for r in rows]
    left = np.concatenate([on_grid(r, 4, False)[..., :32].reshape(-1, 32) for r in rows])
    expected = left @ on_grid(h.T @ w, 4, True)
    np.testing.assert_allclose(found.reshape(6, 8), expected, atol=1e-4)


def _with_zero(row: np.ndarray) -> np.ndarray:
    """A row whose range contains 0; what was added is cut off again."""
    return np.concatenate([row, np.zeros_like(row)], axis=-1)


def _apply(function, params, x):
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    params = jax.tree.map(jnp.float32, params)
    return Model().apply({"params": params}, jnp.float32(x), mutable=["ranges"])


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_without_rounding_the_function_stays(family, model, monkeypatch):
    """Every rotation is undone somewhere: grids that round nothing give the model's function."""
    built_model, params = small_model(family, {"gate": "linear"}, num_layers=2, **model)
    batch = small_batch(family)
    exact = logits(built_model, params, batch)
    used = []

    def unrounded(x, grid, bits, spec, switch=None, rotated=None):
        used.append(rotated)
        turned = x if rotated is None else rotate(x, rotated)
        return Quantized(turned, jnp.float32(1.0), dtype=x.dtype, rotated=rotated)

    monkeypatch.setattr(sites, "on_grid", unrounded)
    monkeypatch.setattr("quantizable_flax.quantization.weight_site.on_grid", unrounded)
    model = with_quant(built_model, ROTATED)
    inputs = [x for key, x in batch.items() if key != "labels"]
    found, _ = model.apply({"params": params}, *inputs, mutable=["ranges"])
    # Of each layer six kernels, two LayerNorms or what is before them, two of the FFN, output,
    # context, two sums; and the embeddings.
    assert len([axis for axis in used if axis is not None]) >= 2 * 13
    assert error(np.asarray(found), exact) < 1e-5


def test_what_is_rotated_by_default():
    model = build_model(small_config("bert", {"gate": "linear"}))
    rotated = {name for name in site_names(model, ROTATED) if ROTATED.rotates(name)}
    layer = {
        *(f"attention/{name}/weight" for name in ("query", "key", "value", "output")),
        *("ffn_in/weight", "ffn_out/weight"),
        *("attention/context", "attention/output/output", "attention_residual"),
        *("attention_layer_norm/output", "ffn_in/output", "ffn_out/output"),
        *("ffn_residual", "ffn_layer_norm/output"),
    }
    embeddings = {"word_type_sum", "position_sum", "layer_norm/output"}
    assert rotated == {f"layer_0/{x}" for x in layer} | {f"embeddings/{x}" for x in embeddings}


@pytest.mark.parametrize("channel", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("family", "model"), MODELS)
def test_integers_are_the_simulation(family, model, channel):
    spec = dataclasses.replace(ROTATED, weight_per_channel=channel)
    case = make_case(family, spec, {"gate": "linear"}, **model)
    found = check_agreement(case, *inputs_of(family))
    floats = case.in_float(*inputs_of(family))
    assert 0 < np.abs(found - floats).max() < 0.3 * np.abs(floats).max()
    usual = make_case(family, QuantSpec(weight_per_channel=channel), {"gate": "linear"}, **model)
    products = [count_products(c.native, c.codes) for c in (case, usual)]
    assert products[0][0] == products[1][0]  # as many of integers, beside those of the rotations


def test_keys_that_are_rotated_are_cached_as_numbers():
    """They are split into heads, behind which no rotation is known."""
    spec = QuantSpec(head=True, hadamard="layer_0/attention/(key|value)/output")
    case, inputs = make_case("opt", spec), inputs_of("opt")[0]
    positions = jnp.broadcast_to(jnp.arange(12), inputs.shape)

    def last(model, params):
        cache = model.empty_cache(len(inputs), 12)
        found, _ = model.apply(
            {"params": params, "cache": cache},
            *(inputs, positions, jnp.ones_like(inputs, bool), jnp.int32(0)),
            method="extend",
            mutable=["cache"],
        )
        return found

    whole = jax.jit(case.native.apply)({"params": case.codes}, inputs)[:, -1]
    found = jax.jit(functools.partial(last, case.native))(case.codes)
    np.testing.assert_allclose(found, whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("name", ["bert", pytest.param("opt", marks=pytest.mark.slow)])
def test_w8a8_recovers_from_planted_outliers(name):
    model, params, batch = built(name)
    exact = logits(model, params, batch)
    params = planted(model, params)
    errors = {}
    for key, spec in (("plain", QuantSpec()), ("rotated", ROTATED)):
        quantized = with_quant(model, spec)
        ranges = calibrate(quantized, params, [batch])
        errors[key] = error(logits(quantized, params, batch, ranges), exact)
    # Two channels of 50 times the size, spread over 32: measured 0.55 of it for OPT.
    assert errors["rotated"] < 0.7 * errors["plain"]


def test_grids_can_be_learned_in_the_rotated_basis():
    model, params = small_model("opt")
    model, batch = with_quant(model, ROTATED), small_batch("opt")
    ranges = calibrate(model, params, [batch])
    learned = jax.jit(functools.partial(with_grids, model))(params, ranges)
    inputs = batch["input_ids"]
    found, expected = (
        model.apply({"params": p, "ranges": r}, inputs)
        for p, r in ((learned, {}), (params, ranges))
    )
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())

    def loss(params):
        return model.apply({"params": params}, batch, method="loss").total

    grads = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(learned), sep="/")
    assert all(np.all(np.isfinite(g)) for g in grads.values())
    assert np.any(grads["layer_0/ffn_out/output/grid/scale"] != 0)


def test_sensitivity_tells_a_site_that_is_rotated():
    model, params = small_model("vit")
    batch = small_batch("vit")
    spec = QuantSpec(2, 2)
    costs = [
        dict(sensitivity(with_quant(model, s), params, [batch], [batch]))
        for s in (spec, dataclasses.replace(spec, hadamard="layer_0/ffn_out/(output|weight)"))
    ]
    differ = {name for name in costs[0] if abs(costs[0][name] - costs[1][name]) > 1e-5}
    assert differ == {"layer_0/ffn_out/output", "layer_0/ffn_out/weight"}


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("layer_0/attention/scores", {}, "rotates features, found the site layer_0/attention/sc"),
        ("layer_0/ffn_layer_norm/weight", {}, "found the weight layer_0/ffn_layer_norm/weight"),
        ("layer_0/ffn_outt/output", {}, r"quant\.hadamard .* matches none of .* layer_0/ffn_out"),
        (HADAMARD, {"intermediate_size": 100}, "found 100: leave \\+hadamard out"),
    ],
)
def test_mistakes_are_one_sentence(pattern, sizes, message):
    model = build_model(small_config("opt", **sizes))
    with pytest.raises(UserError, match=message):
        check_spec(model, QuantSpec(hadamard=pattern))


def test_onnx_refuses_it():
    model, params = small_model("opt")
    with pytest.raises(UserError, match="no rotations before its grids, found \\+hadamard"):
        to_onnx(with_quant(model, ROTATED), params, {})
