"""Calibration and quantized inference of whole models against the original."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import UserError
from quantizable_flax.quantization.calibration import calibrate, make_calibrate_step
from tests.helpers import batch_of, golden, golden_names
from tests.quantization.golden_case import EVALUATION, Case, load

# How far a range may be from the original's, as a share of its larger end. Weights see no
# arithmetic but min and max. The embeddings come before any rounded product. From there on a
# value may differ in its last bit and round to the other side: one such flip moves everything
# behind it by up to a step of the grid (measured: most sites 3e-7, after flips up to 0.9 steps).
WEIGHTS, EMBEDDINGS, AFTER_A_FLIP_STEPS = 1e-6, 1e-5, 1.0

MODELS = [name.removeprefix("quant_") for name in golden_names("quant_*")]


# A case compiles for seconds. These differ from others in numbers alone, and so do most cases of
# the models that are not vanilla: `make soak` runs all of them.
SLOW = {"w8a8_mse", "w6a8_mse", "w4a8_mse", "w8a8_mse_fp32_head"}


def cases() -> list:
    """Every golden case of every model."""
    found = []
    for model in MODELS:
        for name, info in golden(f"quant_{model}").config["cases"].items():
            if "acts" in info["kw"]:
                continue  # MSE ranges of activations are not offered
            vanilla = model.endswith("_vanilla")
            slow = name in SLOW if vanilla else name != "w8a8_minmax"
            marks = (pytest.mark.slow,) if slow else ()
            found.append(pytest.param((model, name), id=f"{model}-{name}", marks=marks))
    return found


@pytest.fixture(scope="module", params=cases())
def case(request) -> Case:
    return load(*request.param)


def test_ranges_of_every_site_match(case):
    ours = traverse_util.flatten_dict(case.ranges, sep="/")
    theirs = case.originals()
    assert set(ours) == set(theirs)
    step = 2.0 / (2 ** case.options["n_bits_act"] - 1)
    deviations = []
    for path, expected in theirs.items():
        largest = max(np.abs(expected.min).max(), np.abs(expected.max).max())
        ends = ((ours[path].min, expected.min), (ours[path].max, expected.max))
        error = max(np.abs(a - b).max() for a, b in ends) / largest
        if path.endswith("weight/range"):
            limit = WEIGHTS
        elif path.startswith("embeddings"):
            limit = EMBEDDINGS
        else:
            limit = AFTER_A_FLIP_STEPS * step
        assert error <= limit, path
        deviations.append(error)
    # Weights and everything before the first flip: measured 38 % of the sites without weights
    # (a8_only), else more than half.
    assert np.mean(np.array(deviations) < EMBEDDINGS) > 0.3


def test_inference_with_the_original_ranges_matches(case):
    ranges = traverse_util.unflatten_dict(case.originals(), sep="/")
    expected = case.file[f"{case.name}/loss_eval"]
    np.testing.assert_allclose(case.losses(ranges), expected, rtol=5e-3)
    if f"{case.name}/logits_eval0" in case.file:
        logits = case.file[f"{case.name}/logits_eval0"]
        actual = case.evaluate(ranges, EVALUATION[0])[0]
        error = np.abs(actual[tuple(slice(size) for size in logits.shape)] - logits)
        error /= np.abs(logits).max()
        # A flip in one token moves this token's logits (by 2 % at 6 bits), hardly the others.
        assert np.median(error) < 1e-6
        assert error.max() < 0.05


def test_perplexity_after_our_calibration_matches(case):
    perplexity = np.exp(case.losses(case.ranges).mean())
    np.testing.assert_allclose(perplexity, case.file.config["cases"][case.name]["ppl"], rtol=1e-2)


@pytest.mark.parametrize("model", MODELS)
def test_floating_point_perplexity_is_exact(model):
    case = load(model, "fp")
    losses = case.losses({})
    np.testing.assert_allclose(losses, case.file["fp/loss_eval"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(losses.mean()), case.file.config["fp_ppl"], rtol=1e-6)


def test_calibration_compiles_one_step():
    case = load(MODELS[0], "w8a8_minmax")
    step = make_calibrate_step(case.model)
    batches = [batch_of(case.file, index) for index in range(3)]
    ranges = calibrate(case.model, case.params, batches, step=step)
    assert step._cache_size() == 1
    again = calibrate(case.model, case.params, batches, step=step)
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, ranges, again)


def test_calibration_without_batches_is_an_error():
    case = load(MODELS[0], "w8a8_minmax")
    with pytest.raises(UserError, match="at least one batch, found none"):
        calibrate(case.model, case.params, [])
