"""LayerNorm and RMSNorm: their formulas, their gradients, their grids."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.nn.norm import NORMS, Norm

EPSILON, WIDTH = 1e-3, 24


def formula(kind: str, x, scale, bias=0.0):
    """In float64."""
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    if kind == "layer_norm":
        x = x - np.mean(x, -1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * scale + bias


def case(kind: str, shift: float = 3.0):
    rng = np.random.default_rng(0)
    x = rng.normal(shift, 2.0, (2, 5, WIDTH))
    scale = rng.normal(1.0, 0.3, 1 if kind == "rms_norm_single" else WIDTH)
    params = {"scale": jnp.float32(scale)}
    if kind == "layer_norm":
        params["bias"] = jnp.float32(rng.normal(0.0, 0.3, WIDTH))
    return x, params


@pytest.mark.parametrize("kind", NORMS)
def test_value_is_the_formula(kind):
    x, params = case(kind)
    found = Norm(kind, EPSILON).apply({"params": params}, jnp.float32(x))
    expected = formula(kind, x, **params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    fresh = nn.unbox(Norm(kind).init(jax.random.key(0), jnp.float32(x)))["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("kind", NORMS)
def test_gradient_is_the_difference_quotient_of_the_formula(kind):
    x, params = case(kind)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=x.shape)
    point = {"x": jnp.float32(x), **params}
    along = {name: rng.normal(size=np.shape(value)) for name, value in point.items()}

    def loss(point):
        params = {name: value for name, value in point.items() if name != "x"}
        y = Norm(kind, EPSILON).apply({"params": params}, point["x"])
        return jnp.sum(y * jnp.float32(weights))

    gradient = jax.grad(loss)(point)
    slope = sum(np.sum(np.float64(gradient[name]) * along[name]) for name in point)
    step = 1e-5

    def moved(by):
        at = {name: np.float64(value) + by * along[name] for name, value in point.items()}
        return np.sum(formula(kind, **at) * weights)

    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("kind", NORMS)
def test_statistics_are_float32_in_a_bfloat16_model(kind):
    x, params = case(kind, shift=0.0)
    x = np.asarray(jnp.bfloat16(x * 1e3))  # squares that bfloat16 would add up to two digits
    found = Norm(kind, EPSILON, dtype=jnp.bfloat16).apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    expected = formula(kind, x, **params)
    # One rounding to 8 bits at the end, of values up to 4.
    np.testing.assert_allclose(np.float64(found), expected, atol=2.0**-9 * 8)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_scale_and_output_are_on_grids(kind, per_channel):
    x, params = case(kind)
    spec = QuantSpec(weight_bits=4, activation_bits=4, weight_per_channel=per_channel)
    y, found = Norm(kind, EPSILON, quant=spec).apply(
        {"params": params}, jnp.float32(x), mutable=["ranges"]
    )
    scale = np.float64(params["scale"])
    if not per_channel:  # a channel that is one number is on its own grid exactly
        unsigned = scale.min() >= 0
        step = np.abs(scale).max() / (15 if unsigned else 7)
        scale = np.round(scale / step) * step
    exact = formula(kind, x, scale, params.get("bias", 0.0))
    low, high = found["ranges"]["output"]["range"][:2]
    np.testing.assert_allclose((low, high), (exact.min(), exact.max()), rtol=1e-4)
    step = (high - low) / 15
    assert np.abs(y.values() - exact).max() <= 0.501 * step
    assert len(np.unique(y.codes)) <= 16
