"""NaN and infinity: calibration refuses them, a simulation passes them on, int8 cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec, UserError, calibrate, to_int8, with_quant
from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.tensor import quantize, quantize_int8
from tests.small import small_batch, small_model


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_calibration_names_a_site_with_a_value_that_is_not_finite(value, estimator):
    model, params = small_model("vit")
    batch = small_batch("vit")
    images = model.normalise(batch["images"])
    broken = {**batch, "images": images.at[0, 0, 0, 0].set(value)}
    spec = QuantSpec(activation_estimator=estimator)
    with pytest.raises(UserError, match=r"not finite at embeddings/pa.*floating point"):
        # Not only in the last batch.
        calibrate(with_quant(model, spec), params, [broken, {**batch, "images": images}])


def test_weights_that_are_not_finite_are_found_too():
    model, params = small_model("bert")
    table = params["embeddings"]["word"]["embedding"].at[3, 0].set(np.nan)
    params = {**params, "embeddings": {**params["embeddings"], "word": {"embedding": table}}}
    with pytest.raises(UserError, match="not finite at embeddings/word/weight"):
        calibrate(with_quant(model, QuantSpec()), params, [small_batch("bert")])


def test_nan_behind_calibration():
    grid = make_grid(jnp.float32(-1.0), jnp.float32(3.0), 8, symmetric=False)
    x = jnp.array([np.nan, -np.inf, np.inf, 0.5])
    simulated = jax.jit(lambda x: quantize(x, grid).values())(x)
    native = jax.jit(lambda x: quantize_int8(x, grid).values())(x)
    assert np.isnan(simulated[0])
    # An integer cannot say NaN: it becomes some number of the grid.
    assert -1.01 <= native[0] <= 3.01
    np.testing.assert_array_equal(simulated[1:], native[1:])
    np.testing.assert_allclose(native[1:3], [-1.0, 3.0], atol=0.02)


def test_one_image_that_is_not_finite_spoils_no_other():
    model, params = small_model("vit")
    batch = small_batch("vit")
    images = model.normalise(batch["images"])
    quantized = with_quant(model, QuantSpec(head=True))
    ranges = calibrate(quantized, params, [batch])
    native, int8_params = to_int8(quantized, params, ranges)
    run = jax.jit(native.apply)
    clean = run({"params": int8_params}, images)
    broken = run({"params": int8_params}, images.at[1].set(np.nan))
    np.testing.assert_array_equal(clean[::2], broken[::2])
