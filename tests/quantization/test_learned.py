"""Learned grids: their gradients against the formula, how they begin, and where they are kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.calibrate import calibrate, with_grids
from quantizable_flax.ptq.int8 import to_int8
from quantizable_flax.quantization.grid import MIN_MAX, make_grid
from quantizable_flax.quantization.learned import begin, learned_grid, without_grids
from quantizable_flax.quantization.tensor import fake_quantize
from quantizable_flax.training.optimizer import decay_mask
from tests.small import small_batch, small_model

BITS = 4


def gradients(parameters, x, cotangent, symmetric):
    def total(parameters, x):
        grid = learned_grid(parameters, BITS, symmetric=symmetric)
        return jnp.sum(cotangent * fake_quantize(x, grid))

    return jax.grad(total, (0, 1))(parameters, x)


def by_formula(scale, zero, bounds, x, cotangent, axes):
    """The gradients (scale, zero, x) in float64, written from the definition."""
    scale, zero, x, cotangent = (np.asarray(a, np.float64) for a in (scale, zero, x, cotangent))
    zero = np.round(zero)
    code = np.round(x / scale) + zero
    inside = (bounds[0] <= code) & (code <= bounds[1])
    clipped = np.clip(code, *bounds)
    to_scale = np.where(inside, clipped - zero - x / scale, clipped - zero)
    to_zero = np.where(inside, 0.0, -scale)
    keep = axes is not None
    reduced = tuple(range(x.ndim)) if axes is None else axes
    to_scale, to_zero = ((g * cotangent).sum(reduced, keepdims=keep) for g in (to_scale, to_zero))
    return to_scale, to_zero, inside * cotangent


X = jax.random.normal(jax.random.key(0), (64, 5))
COTANGENT = jax.random.normal(jax.random.key(1), X.shape)


@pytest.mark.parametrize("zero", [0.0, 6.3, 15.0])  # the ends too: a ReLU's zero point is 0
def test_asymmetric_gradients_match_the_formula(zero):
    parameters = {"scale": jnp.float32(0.17), "zero": jnp.float32(zero)}
    own, to_x = gradients(parameters, X, COTANGENT, symmetric=False)
    scale, zero_point, inside = by_formula(0.17, zero, (0, 15), X, COTANGENT, None)
    np.testing.assert_allclose(own["scale"], scale, rtol=1e-4)
    np.testing.assert_allclose(own["zero"], zero_point, rtol=1e-4)
    np.testing.assert_allclose(to_x, inside, rtol=1e-6)


@pytest.mark.parametrize(("signed", "bounds"), [(1.0, (-8, 7)), (0.0, (0, 15))])
def test_symmetric_gradients_per_channel_match_the_formula(signed, bounds):
    scale = jnp.linspace(0.05, 0.3, 5)[None]
    parameters = {"scale": scale, "signed": jnp.full_like(scale, signed)}
    own, to_x = gradients(parameters, X, COTANGENT, symmetric=True)
    expected, _, inside = by_formula(scale, jnp.zeros(()), bounds, X, COTANGENT, (0,))
    np.testing.assert_allclose(own["scale"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_x, inside, rtol=1e-6)
    assert not np.any(own["signed"])


def test_zero_point_off_the_grid_is_clipped_and_gets_no_gradient():
    parameters = {"scale": jnp.float32(0.2), "zero": jnp.float32(17.0)}
    assert learned_grid(parameters, BITS, symmetric=False).zero_point == 15.0
    own, _ = gradients(parameters, X, COTANGENT, symmetric=False)
    assert own["zero"] == 0.0


@pytest.mark.parametrize("scale", [-10.0, -1e-3, 0.0, 1e-9])
def test_scale_stays_positive_and_can_come_back(scale):
    parameters = {"scale": jnp.float32(scale), "zero": jnp.float32(3.0)}
    assert learned_grid(parameters, BITS, symmetric=False).scale == np.float32(MIN_MAX)
    own, _ = gradients(parameters, X, COTANGENT, symmetric=False)
    assert own["scale"] != 0.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ends", [(-1.3, 2.9), (0.0, 2.0), (0.4, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_learning_begins_with_the_calibrated_grid(ends, symmetric):
    low, high = map(jnp.float32, ends)
    begun = learned_grid(begin(low, high, BITS, symmetric=symmetric), BITS, symmetric=symmetric)
    for actual, expected in zip(
        begun, make_grid(low, high, BITS, symmetric=symmetric), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@functools.partial(jax.jit, static_argnums=0)
def losses(model, variables, batch):
    return model.apply(variables, batch, method="loss").loss


@pytest.fixture(scope="module")
def learned():
    """(quantized model, its float params, its ranges, params with grids, a batch)."""
    model, params = small_model("opt", {"gate": "linear"})
    model = with_quant(model, QuantSpec(weight_per_channel=True, head=True))
    batch = small_batch("opt")
    ranges = calibrate(model, params, [batch])
    return (
        model,
        params,
        ranges,
        jax.jit(with_grids, static_argnums=0)(model, params, ranges),
        batch,
    )


def test_model_with_grids_is_the_calibrated_model_without_ranges(learned):
    model, params, ranges, grids, batch = learned
    expected = losses(model, {"params": params, "ranges": ranges}, batch)
    np.testing.assert_array_equal(losses(model, {"params": grids}, batch), expected)
    assert jax.tree.structure(without_grids(grids)) == jax.tree.structure(params)
    dense = grids["layer_0"]["ffn_in"]
    assert set(dense["output"]["grid"]) == {"scale", "zero"}
    assert dense["weight"]["grid"]["scale"].shape == (1, 64)


def test_grids_are_never_decayed(learned):
    mask = decay_mask(learned[3], decay_layer_norm=True)
    dense = mask["layer_0"]["ffn_in"]
    assert dense["kernel"]
    assert not any(jax.tree.leaves([dense["output"], dense["weight"]]))


def test_learned_grids_are_served_in_int8(learned):
    model, _, _, grids, batch = learned
    expected = losses(model, {"params": grids}, batch)
    served, stored = to_int8(model, grids, {})
    np.testing.assert_allclose(losses(served, {"params": stored}, batch), expected, rtol=1e-5)
