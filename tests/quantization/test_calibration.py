"""Calibration and quantized inference of whole models against the original."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import QuantSpec, UserError, build_model
from quantizable_flax.interop import from_state_dict
from quantizable_flax.models.losses import masked_token_loss
from quantizable_flax.models.registry import with_quant
from quantizable_flax.quantization.calibration import calibrate, make_calibrate_step
from quantizable_flax.quantization.ranges import Range
from tests.helpers import Golden, batch_of, bert_config, golden, golden_names
from tests.quantization.original_sites import our_site, our_spec

CALIBRATION, EVALUATION = range(16), range(16, 20)

# How far a range may be from the original's, as a share of its larger end. Weights see no
# arithmetic but min and max. The embeddings come before any rounded product. From there on a
# value may differ in its last bit and round to the other side: one such flip moves everything
# behind it by up to a step of the grid (measured: most sites 3e-7, after flips up to 0.9 steps).
WEIGHTS, EMBEDDINGS, AFTER_A_FLIP_STEPS = 1e-6, 1e-5, 1.0


@dataclasses.dataclass
class Case:
    """One golden model in one quantization setting."""

    file: Golden
    name: str
    params: dict
    model: object
    options: dict

    @functools.cached_property
    def ranges(self):
        return calibrate(self.model, self.params, (batch_of(self.file, i) for i in CALIBRATION))

    @functools.cached_property
    def evaluate(self):
        @jax.jit
        def evaluate(params, ranges, batch):
            inputs = (batch[key] for key in ("input_ids", "attention_mask", "token_type_ids"))
            logits = self.model.apply({"params": params, "ranges": ranges}, *inputs)
            total_B, count_B = masked_token_loss(logits, batch["labels"])
            return logits, total_B.sum() / count_B.sum()

        return lambda ranges, index: evaluate(self.params, ranges, batch_of(self.file, index))

    def losses(self, ranges) -> np.ndarray:
        return np.array([self.evaluate(ranges, index)[1] for index in EVALUATION])


def load(model_name: str, case_name: str) -> Case:
    file = golden(f"quant_bert_{model_name}")
    config = bert_config(file.config)
    weights = golden(f"model_bert_{model_name}").group("w")
    params = jax.tree.map(jnp.asarray, from_state_dict(weights, config))
    options = file.config["cases"].get(case_name, {}).get("kw")
    model = with_quant(build_model(config), our_spec(options) if options else None)
    return Case(file, case_name, params, model, options)


MODELS = [name.removeprefix("quant_bert_") for name in golden_names("quant_bert_*")]
CASES = [
    (model, case)
    for model in MODELS
    for case, info in golden(f"quant_bert_{model}").config["cases"].items()
    if "acts" not in info["kw"]  # MSE ranges of activations are not offered
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> Case:
    return load(*request.param)


def originals(case: Case) -> dict[str, Range]:
    """The original's ranges by our paths, in its order of execution."""
    shapes = traverse_util.flatten_dict(case.ranges, sep="/")
    found = {}
    for site in case.file.config["sites"][case.name]:
        path = our_site(site["name"])
        shape = shapes[path].min.shape
        ends = (jnp.asarray(site[end], jnp.float32).reshape(shape) for end in ("x_min", "x_max"))
        found[path] = Range(*ends, jnp.int32(1))
    return found


def test_ranges_of_every_site_match(case):
    ours = traverse_util.flatten_dict(case.ranges, sep="/")
    theirs = originals(case)
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
    # Weights and everything before the first flip: the larger part of all sites by far.
    assert np.mean(np.array(deviations) < EMBEDDINGS) > 0.4


def test_inference_with_the_original_ranges_matches(case):
    ranges = traverse_util.unflatten_dict(originals(case), sep="/")
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
    case = load(*CASES[0])
    step = make_calibrate_step(case.model)
    batches = [batch_of(case.file, index) for index in range(3)]
    ranges = calibrate(case.model, case.params, batches, step=step)
    assert step._cache_size() == 1
    again = calibrate(case.model, case.params, batches, step=step)
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, ranges, again)


def test_calibration_without_batches_is_an_error():
    case = load(*CASES[0])
    with pytest.raises(UserError, match="at least one batch, found none"):
        calibrate(case.model, case.params, [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight_bits": 1}, "weight_bits must be in 2..16, found 1"),
        ({"activation_bits": 17}, "activation_bits must be in 2..16, found 17"),
        ({"weight_estimator": "mse2"}, "found 'mse2'.*did you mean 'mse'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), found 1.0"),
        ({"percentile": 50.0}, r"percentile must be in \(50, 100\], found 50.0"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        QuantSpec(**options)
