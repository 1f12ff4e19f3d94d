"""The tap: no trace when nobody asks, calibrated ranges when somebody does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec, UserError, build_model, default_config
from quantizable_flax.models.registry import with_quant
from quantizable_flax.quantization.calibration import calibrate
from quantizable_flax.quantization.fake_quant import fake_quantize
from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.layers import Dense
from quantizable_flax.quantization.sites import Site, WeightSite
from quantizable_flax.quantization.spec import parse_bits
from quantizable_flax.quantization.statistics import inf_norm, kurtosis

X = jax.random.normal(jax.random.key(0), (4, 3, 8))
W8A8 = QuantSpec()


@pytest.fixture(scope="module")
def bert():
    config = default_config()
    config.model.update(
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 8,
        }
    )
    config.model.attention.update({"softmax": "clipped", "gamma": -0.03, "gate": "linear"})
    config.data.seq_len = 8
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones((2, 8))}
    model = build_model(config)
    return model, jax.jit(model.init)(jax.random.key(2), ids), batch


def training_program(bert) -> tuple[str, str]:
    """The traced and the lowered text of a training gradient."""
    model, variables, batch = bert

    def total(params, key):
        loss_B, _ = model.apply(
            {"params": params}, batch, train=True, method="loss", rngs={"dropout": key}
        )
        return loss_B.sum()

    arguments = (nn.meta.unbox(variables["params"]), jax.random.key(0))
    traced = jax.jit(jax.grad(total)).trace(*arguments)
    return str(traced.jaxpr), traced.lower().as_text()


def test_unused_sites_leave_no_operation(bert, monkeypatch):
    with_sites = training_program(bert)
    calls = []

    def identity(self, x):
        calls.append(self.name)
        return x

    for cls in (Site, WeightSite):
        monkeypatch.setattr(cls, "__call__", identity)
    without_sites = training_program(bert)
    assert {"scores", "probs", "context", "weight", "output"} <= set(calls)
    assert with_sites == without_sites


def test_quantized_sites_do_leave_operations(bert):
    model, variables, batch = bert
    ranges = calibrate(with_quant(model, W8A8), variables["params"], [batch])
    clean, rounded = (
        jax.jit(functools.partial(with_quant(model, spec).apply, method="loss"))(
            {**variables, "ranges": ranges}, batch
        )[0]
        for spec in (None, W8A8)
    )
    assert not np.array_equal(clean, rounded)
    np.testing.assert_allclose(clean, rounded, rtol=0.01)


@pytest.mark.parametrize("spec", [None, W8A8], ids=["float", "w8a8"])
def test_init_creates_parameters_only(bert, spec):
    model, variables, batch = bert
    fresh = jax.eval_shape(with_quant(model, spec).init, jax.random.key(0), batch["input_ids"])
    assert set(fresh) == {"params"}
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)


def test_uncalibrated_site_is_named(bert):
    model, variables, batch = bert
    for spec, site in (
        (W8A8, "embeddings/word/weight"),
        (QuantSpec(weight_bits=None), "embeddings/word_type_sum"),
    ):
        with pytest.raises(UserError, match=f"site {site} has no calibrated range"):
            with_quant(model, spec).apply(variables, batch, method="loss")


def calibrated(site: Site, batches):
    variables: dict = {}
    for x in batches:
        out, variables = site.apply(variables, x, mutable=["ranges"])
    return out, variables


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
    np.testing.assert_array_equal(Site(W8A8).apply(variables, 3.0 * X), out)


def test_weight_range_is_taken_once():
    site = WeightSite(W8A8)
    _, variables = site.apply({}, X, mutable=["ranges"])
    out, again = site.apply(variables, 5.0 * X, mutable=["ranges"])
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    assert np.abs(out).max() < 1.1 * np.abs(X).max()


def test_per_channel_weights_have_a_scale_per_output():
    kernel = X[0] * jnp.logspace(-3, 3, 8)
    site = WeightSite(QuantSpec(weight_per_channel=True))
    out, variables = site.apply({}, kernel, mutable=["ranges"])
    assert variables["ranges"]["range"][0].shape == (1, 8)
    step = np.abs(kernel).max(0) / 127
    assert np.all(np.abs(out - kernel) <= 0.501 * step)


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
        return jnp.sum(Dense(4, quant=quant).apply({"params": params, **updated}, X) ** 2)

    straight, exact = (jax.grad(total)(variables["params"], quant) for quant in (W8A8, None))
    for actual, expected in zip(jax.tree.leaves(straight), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [None, W8A8])
def test_statistics_are_of_what_the_site_returns(spec):
    site = Site(spec)
    _, variables = site.apply({}, X, mutable=["ranges"])
    out, recorded = site.apply(variables, X, mutable=["stats"])
    np.testing.assert_array_equal(recorded["stats"]["inf_norm"], inf_norm(out))
    np.testing.assert_array_equal(recorded["stats"]["kurtosis"], kurtosis(out))


@pytest.mark.parametrize(
    ("name", "bits"), [("w8a8", (8, 8)), ("w4a16", (4, 16)), ("w8", (8, None)), ("a6", (None, 6))]
)
def test_bit_widths_are_read(name, bits):
    assert parse_bits(name) == bits


@pytest.mark.parametrize("name", ["", "8", "w8a", "a8w8", "w8a8x", "W8A8"])
def test_unreadable_bit_widths_are_named(name):
    with pytest.raises(UserError, match=f"must read like w8a8, w4a8, w8 or a8, found '{name}'"):
        parse_bits(name)
