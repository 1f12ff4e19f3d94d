"""Range estimators against the original, batch by batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.quantization.grid import symmetric_grid
from quantizable_flax.quantization.ranges import (
    Range,
    min_max,
    mse_range,
    percentile_range,
    update_running,
)
from quantizable_flax.quantization.tensor import fake_quantize
from tests.helpers import golden

FILE = golden("range_estimators")
CASES = FILE.config["cases"]
# A percentile lies between two neighbours at a place that we compute in float32, the original in
# float64: some 3e-5 of their distance, which at an outlier is as large as the value itself.
PERCENTILE = 2e-5
UNKNOWN = Range(jnp.float32(0.0), jnp.float32(0.0), jnp.int32(0))


def select(condition) -> list[str]:
    return [name for name, case in CASES.items() if condition(case)]


def check(name: str, index: int, low, high, rtol: float) -> None:
    for end, value in (("xmin", low), ("xmax", high)):
        expected = FILE[f"{name}/{end}"][index]
        np.testing.assert_allclose(np.ravel(value), expected, rtol=rtol, err_msg=f"{name} {index}")


@pytest.mark.parametrize("name", select(lambda case: case["est"] == "current_minmax"))
def test_current_range_matches(name):
    case, batches = CASES[name], FILE["in/x"]
    axis = 0 if case.get("per_channel") else None
    for index in range(len(FILE[f"{name}/xmin"])):
        x = jnp.asarray(batches[index])
        if "percentile" in case:  # (p, 100 - p) there
            ends = percentile_range(x, 100.0 - case["percentile"], axis)
            check(name, index, *ends, PERCENTILE)
        else:
            check(name, index, *min_max(x, axis), rtol=0.0)


@pytest.mark.parametrize(
    "name", select(lambda case: case["est"] == "running_minmax" and not case.get("per_channel"))
)
def test_running_range_matches(name):
    case, known = CASES[name], UNKNOWN
    # Without percentile the arithmetic is two products and a sum: the same float32 bits but for
    # one unit in the last place.
    rtol = PERCENTILE if "percentile" in case else 2e-7
    for index, x in enumerate(FILE[f"in/{case['data']}"]):
        known = update_running(
            known, jnp.asarray(x), momentum=case["momentum"], percentile=case.get("percentile")
        )
        check(name, index, known.min, known.max, rtol)
        assert known.batches == index + 1


def achieved(x, low, high, bits: int, axis: int | None) -> np.ndarray:
    """Squared quantization error of a threshold, of the tensor or of each channel."""
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = (-1,) + (1,) * (x.ndim - 1) if axis == 0 else ()
    low, high = (jnp.asarray(bound).reshape(shape) for bound in (low, high))
    return np.asarray(jnp.sum((fake_quantize(x, symmetric_grid(low, high, bits)) - x) ** 2, axes))


def of_a_weight(case) -> bool:
    return case["est"] == "MSE" and case["data"] in ("weight", "ln_gamma")


@pytest.mark.parametrize("name", select(of_a_weight))
def test_mse_threshold_matches(name):
    case = CASES[name]
    x = jnp.asarray(FILE[f"in/{case['data']}"])
    axis = 0 if case.get("per_channel") else None
    low, high = jax.jit(mse_range, static_argnums=(1, 2))(x, case["bits"], axis)
    expected = (FILE[f"{name}/xmin"][0], FILE[f"{name}/xmax"][0])
    same = np.isclose(np.ravel(low), expected[0], rtol=1e-6, atol=0.0)
    same &= np.isclose(np.ravel(high), expected[1], rtol=1e-6, atol=0.0)
    # Neighbouring candidates can be all but equally good: then the errors must be.
    ours, theirs = (achieved(x, *ends, case["bits"], axis) for ends in ((low, high), expected))
    assert np.all(same | np.isclose(np.ravel(ours), np.ravel(theirs), rtol=1e-5))
    assert np.mean(same) > 0.7


def test_running_range_forgets_by_momentum():
    known = UNKNOWN
    for value in (1.0, 2.0, 4.0):
        known = update_running(known, jnp.array([-value, value]), momentum=0.5)
    np.testing.assert_allclose([known.min, known.max], [-2.75, 2.75])


def test_mse_clips_an_outlier_that_min_max_keeps():
    # At 4 bits one weight of 20 would stretch the steps of two thousand normal ones.
    w = np.append(np.random.default_rng(0).normal(size=2000), 20.0).astype(np.float32)
    _, high = mse_range(jnp.asarray(w), 4)
    assert high < 0.8 * min_max(jnp.asarray(w))[1]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_ranges_keep_their_axis(axis):
    x = jax.random.normal(jax.random.key(0), (3, 5))
    low, _ = min_max(x, axis)
    assert low.shape == ((3, 1) if axis == 0 else (1, 5))
    np.testing.assert_array_equal(np.ravel(low), np.asarray(x).min(1 if axis == 0 else 0))


@pytest.mark.parametrize("percentile", [99.0, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("size", [1, 2, 3, 101])
def test_percentile_of_a_small_tensor_interpolates(percentile, size):
    x = np.random.default_rng(size).normal(size=(2, size)).astype(np.float32)
    ends = (100.0 - percentile, percentile)
    for axis, numpy_axis in ((None, None), (0, 1)):
        found = percentile_range(jnp.asarray(x), percentile, axis)
        for value, expected in zip(found, np.percentile(x, ends, axis=numpy_axis), strict=True):
            np.testing.assert_allclose(np.ravel(value), np.ravel(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_percentiles_keep_their_axis(axis):
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    ranges = (min_max(x, axis), percentile_range(x, 100.0, axis))
    for exact, percentile in zip(*ranges, strict=True):
        np.testing.assert_array_equal(exact, percentile)


WEIGHT_RANGES = {
    "minmax": min_max,
    "percentile": lambda w, axis: percentile_range(w, 90.0, axis),
    "mse": lambda w, axis: mse_range(w, 8, axis),
}


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("estimator", WEIGHT_RANGES)
def test_a_value_that_is_not_finite_is_never_overlooked(estimator, bad, axis):
    # One in a hundred: a percentile would clip it.
    w = jax.random.normal(jax.random.key(0), (100, 2)).at[50, 1].set(bad)
    low, high = WEIGHT_RANGES[estimator](w, axis)
    assert np.isnan(np.ravel(low)[-1])
    assert np.isnan(np.ravel(high)[-1])


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-6])
@pytest.mark.parametrize("estimator", ["minmax", "percentile"])
def test_a_constant_weight_survives(estimator, value, axis, bits):
    w = jnp.full((4, 2), value)
    grid = symmetric_grid(*WEIGHT_RANGES[estimator](w, axis), bits)
    np.testing.assert_allclose(fake_quantize(w, grid), w, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_mse_of_a_constant_weight_is_near_it(value, axis):
    w = jnp.full((4, 2), value)
    low, high = mse_range(w, 8, axis)
    assert np.all(high > 0.0)
    assert np.all(low == (0.0 if value >= 0.0 else -high))
    # The first threshold that has a code next to it: a hundredth of 3.5 apart.
    quantized = fake_quantize(w, symmetric_grid(low, high, 8))
    np.testing.assert_allclose(quantized, w, atol=0.02)
