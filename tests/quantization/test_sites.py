"""The tap: no trace when nobody asks, calibrated ranges when somebody does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.nn.layers import Dense
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.statistics import inf_norm, kurtosis
from quantizable_flax.quantization.tensor import fake_quantize, values
from quantizable_flax.quantization.weight_site import WeightSite
from tests.small import small_batch, small_model

X = jax.random.normal(jax.random.key(0), (4, 3, 8))
W8A8 = QuantSpec()


# Every optional part is on, so that all kinds of sites are there.
OPTIONS = {
    "bert": {},
    "opt": {"embed_size": 16},
    "vit": {"num_registers": 2, "patch_layer_norm": True},
}
SOME_SITES = {
    "bert": {"word_type_sum", "ffn_residual"},
    "opt": {"sum", "gated_context"},
    "vit": {"patches", "position_table_weight", "attention_residual"},
}


@pytest.fixture(scope="module", params=OPTIONS)
def family(request):
    return request.param


def gated(family):
    """(model, params, batch), with clipped softmax and gates."""
    attention = {"softmax": "clipped", "gamma": -0.03, "gate": "linear"}
    return *small_model(family, attention, **OPTIONS[family]), small_batch(family)


@pytest.fixture(scope="module")
def bert():
    return gated("bert")


def training_program(model, params, batch) -> tuple[str, str]:
    """The traced and the lowered text of a training gradient."""

    def total(params, key):
        scores = model.apply(
            {"params": params}, batch, train=True, method="loss", rngs={"dropout": key}
        )
        return scores.loss.sum()

    traced = jax.jit(jax.grad(total)).trace(params, jax.random.key(0))
    return str(traced.jaxpr), traced.lower().as_text()


def test_unused_sites_leave_no_operation(family, monkeypatch):
    with_sites = training_program(*gated(family))
    calls = []

    def identity(self, x, visible=None, rows=None):
        calls.append(self.name)
        return x if rows is None else x[rows]

    for cls in (Site, WeightSite):
        monkeypatch.setattr(cls, "__call__", identity)
    without_sites = training_program(*gated(family))
    assert {"scores", "probs", "context", "weight", "output"} | SOME_SITES[family] <= set(calls)
    assert with_sites == without_sites


def test_quantized_sites_do_leave_operations(bert):
    model, params, batch = bert
    ranges = calibrate(with_quant(model, W8A8), params, [batch])
    clean, rounded = (
        jax.jit(functools.partial(with_quant(model, spec).apply, method="loss"))(
            {"params": params, "ranges": ranges}, batch
        ).loss
        for spec in (None, W8A8)
    )
    assert not np.array_equal(clean, rounded)
    np.testing.assert_allclose(clean, rounded, rtol=0.01)


@pytest.mark.parametrize("spec", [None, W8A8], ids=["float", "w8a8"])
def test_init_creates_parameters_only(family, spec):
    model, params, batch = gated(family)
    init = functools.partial(with_quant(model, spec).init, method="loss")
    fresh = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), batch))
    assert set(fresh) == {"params"}
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(params)


def test_uncalibrated_site_is_named(bert):
    model, params, batch = bert
    for spec, site in (
        (W8A8, "embeddings/word/weight"),
        (QuantSpec(weight_bits=None), "embeddings/word_type_sum"),
    ):
        with pytest.raises(UserError, match=f"site {site} has no calibrated range"):
            with_quant(model, spec).apply({"params": params}, batch, method="loss")


def calibrated(site: Site, batches):
    variables: dict = {}
    for x in batches:
        out, variables = site.apply(variables, x, mutable=["ranges"])
    return values(out), variables


def test_site_quantizes_by_the_range_seen_so_far():
    first, second = np.asarray(X), np.asarray(3.0 * X)
    out, variables = calibrated(Site(W8A8), [X, 3.0 * X])
    ends = [0.9 * end(first) + 0.1 * end(second) for end in (np.min, np.max)]
    known = variables["ranges"]["range"]
    np.testing.assert_allclose([known[0], known[1]], ends, rtol=1e-6)
    assert known[2] == 2
    grid = make_grid(known[0], known[1], 8, symmetric=False)
    np.testing.assert_array_equal(out, fake_quantize(3.0 * X, grid))
    # Afterwards the range is fixed, and calibration has seen what inference sees.
    np.testing.assert_array_equal(values(Site(W8A8).apply(variables, 3.0 * X)), out)


def test_weight_range_is_taken_once():
    site = WeightSite(W8A8)
    _, variables = site.apply({}, X, mutable=["ranges"])
    out, again = site.apply(variables, 5.0 * X, mutable=["ranges"])
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    assert np.abs(values(out)).max() < 1.1 * np.abs(X).max()


def test_per_channel_weights_have_a_scale_per_output():
    kernel = X[0] * jnp.logspace(-3, 3, 8)[None]
    site = WeightSite(QuantSpec(weight_per_channel=True))
    out, variables = site.apply({}, kernel, mutable=["ranges"])
    assert variables["ranges"]["range"][0].shape == (1, 8)
    step = np.abs(kernel).max(0) / 127
    assert np.all(np.abs(values(out) - kernel) <= 0.501 * step)


@pytest.mark.parametrize(
    ("spec", "sites"),
    [
        (QuantSpec(weight_bits=None), {"output"}),
        (QuantSpec(activation_bits=None), {"weight"}),
        (W8A8, {"weight", "output"}),
        (None, set()),
    ],
)
def test_one_side_alone_can_be_quantized(spec, sites):
    dense = Dense(4, quant=spec)
    variables = dense.init(jax.random.key(0), X)
    _, updated = dense.apply(variables, X, mutable=["ranges"])
    assert set(updated.get("ranges", {})) == sites


def test_quantized_gradient_reaches_the_parameters():
    dense = Dense(4, quant=W8A8)
    variables = nn.meta.unbox(dense.init(jax.random.key(0), X))
    _, updated = dense.apply(variables, X, mutable=["ranges"])

    def total(params, quant):
        out = Dense(4, quant=quant).apply({"params": params, **updated}, X)
        return jnp.sum(values(out) ** 2)

    straight, exact = (jax.grad(total)(variables["params"], quant) for quant in (W8A8, None))
    for actual, expected in zip(jax.tree.leaves(straight), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [None, W8A8])
def test_statistics_are_of_what_the_site_returns(spec):
    site = Site(spec)
    _, variables = site.apply({}, X, mutable=["ranges"])
    out, recorded = site.apply(variables, X, mutable=["stats"])
    np.testing.assert_array_equal(recorded["stats"]["inf_norm"], inf_norm(values(out)))
    np.testing.assert_array_equal(recorded["stats"]["kurtosis"], kurtosis(values(out)))
