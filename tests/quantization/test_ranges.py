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


def current(case) -> bool:
    return case["est"] == "current_minmax" and not (
        case.get("per_channel") and "percentile" in case
    )


@pytest.mark.parametrize("name", select(current))
def test_current_range_matches(name):
    case, batches = CASES[name], FILE["in/x"]
    for index in range(len(FILE[f"{name}/xmin"])):
        x = jnp.asarray(batches[index])
        if "percentile" in case:  # (p, 100 - p) there
            check(name, index, *percentile_range(x, 100.0 - case["percentile"]), PERCENTILE)
        else:
            check(name, index, *min_max(x, 0 if case.get("per_channel") else None), rtol=0.0)


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


def one_batch_grid(case) -> bool:
    return case.get("opt") == "grid" and case["q"] == "sym" and "num_candidates" not in case


@pytest.mark.parametrize("name", select(one_batch_grid))
def test_mse_threshold_matches(name):
    case = CASES[name]
    data = FILE[f"in/{case['data']}"]
    x = jnp.asarray(data if case["data"] in ("weight", "ln_gamma") else data[0])
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
