"""What each site costs alone."""

import numpy as np
import pytest

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.sensitivity import sensitivity
from tests import compiled
from tests.small import small_batch, small_model

COMPARED = {
    "bert": ("layer_0/attention/scores", "layer_0/ffn_in/weight", "layer_0/ffn_residual"),
    "opt": ("layer_0/ffn_in/weight",),
    "vit": ("layer_0/attention/scores",),
}


def mean_loss(model, params, ranges, batch) -> float:
    scores = model.apply({"params": params, "ranges": ranges}, batch, method="loss")
    return float(scores.loss.sum() / scores.weight.sum())


@pytest.fixture(scope="module", params=["bert", "opt", "vit"])
def family(request):
    return request.param


def test_costs_are_those_of_a_model_with_one_site(family):
    model, params = small_model(family)
    batch = small_batch(family)
    spec = QuantSpec(3, 3)
    costs = dict(sensitivity(with_quant(model, spec), params, [batch], [batch]))
    exact = mean_loss(model, params, {}, batch)
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    # The same by another way: everything else skipped, compiled anew.
    for site in COMPARED[family]:
        alone = with_quant(model, QuantSpec(3, 3, float_sites=rf"(?!{site}$).*"))
        expected = mean_loss(alone, params, calibrate(alone, params, [batch]), batch) - exact
        # Both differ from the exact loss by a few float32 roundings of a loss of about 5.
        assert costs[site] == pytest.approx(expected, abs=5e-6)
        assert abs(expected) > 1e-4


def test_one_program_serves_all_sites():
    model, params = small_model("bert")
    batch = small_batch("bert")
    with compiled.counted() as programs:
        costs = sensitivity(with_quant(model, QuantSpec(3, 3)), params, [batch], [batch])
    assert len(costs) > 20
    assert len(programs) < 10


def test_examples_that_only_fill_a_batch_do_not_count():
    model, params = small_model("opt")
    batch = small_batch("opt")
    quantized = with_quant(model, QuantSpec(3, 3))
    plain = sensitivity(quantized, params, [batch], [batch])
    filled = {key: np.concatenate([value, value[:1] * 0 + 5]) for key, value in batch.items()}
    filled["example_weight"] = np.array([1, 1, 1, 0], np.float32)
    again = dict(sensitivity(quantized, params, [batch], [filled]))
    for site, increase in plain:
        assert again[site] == pytest.approx(increase, abs=5e-6)


def test_embeddings_judge_by_ranges_that_are_known():
    model, params = small_model("bert")
    batch = {key: np.concatenate([x, x[:1] * 0 + 5]) for key, x in small_batch("bert").items()}
    batch["example_weight"] = np.array([1, 1, 1, 0], np.float32)
    quantized = with_quant(model, QuantSpec(3, 3))
    ranges = calibrate(quantized, params, [small_batch("bert")])
    found = sensitivity(quantized, params, (), [batch], fidelity=True, ranges=ranges)
    site = "layer_0/ffn_residual"
    alone = with_quant(model, QuantSpec(3, 3, float_sites=rf"(?!{site}$).*"))
    both = [{"params": params, "ranges": ranges}, {"params": params}]
    pooled, exact = (
        np.asarray(m.apply(variables, batch, method="features").pooled_BxD, np.float64)[:3]
        for m, variables in zip((alone, model), both, strict=True)
    )
    lengths = np.linalg.norm(pooled, axis=1) * np.linalg.norm(exact, axis=1)
    expected = 1.0 - np.mean(np.sum(pooled * exact, axis=1) / lengths)
    # Cosines near 1 are float32, and so is what they lack of it.
    assert dict(found)[site] == pytest.approx(expected, abs=1e-6)
    assert expected > 1e-3


def test_a_scheme_that_quantizes_nothing_is_an_error():
    model, params = small_model("bert")
    batch = small_batch("bert")
    with pytest.raises(UserError, match="needs quantized sites, found none"):
        sensitivity(with_quant(model, QuantSpec(float_sites=".*")), params, [batch], [batch])
