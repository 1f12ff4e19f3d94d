"""`float_sites` and `site_bits`: which pattern decides, and that a site left out is untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import with_config, with_quant
from quantizable_flax.nn.layers import Dense
from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.sites import RANGES, Site
from quantizable_flax.quantization.tensor import fake_quantize, quantize, quantize_int8, values
from tests.ptq.int8_case import check_agreement, inputs_of, make_case
from tests.small import small_model


def test_the_first_pattern_that_matches_decides():
    spec = QuantSpec(8, 6, site_bits=((".*/key/.*", 4), ("layer_0/.*", 3), (".*/key/output", 16)))
    assert spec.bits("layer_0/attention/key/output") == 4
    assert spec.bits("layer_0/attention/key/weight", weight=True) == 4
    assert spec.bits("layer_0/ffn_in/output") == 3
    assert spec.bits("layer_1/ffn_in/output") == 6
    assert spec.bits("layer_1/ffn_in/weight", weight=True) == 8
    assert spec.bits("more/layer_0/ffn_in/output") == 6  # a pattern matches the whole path


def test_float_sites_beat_site_bits():
    spec = QuantSpec(float_sites=".*/key/.*", site_bits=((".*", 4),))
    assert spec.bits("layer_0/attention/key/output") is None
    assert spec.bits("layer_0/attention/value/output") == 4
    int8 = QuantSpec(float_sites=".*/key/.*", site_bits=((".*/value/.*", 9),), backend="int8")
    names = ("key", "value", "query")
    served = [int8.serves_int8(f"layer_0/attention/{name}/output") for name in names]
    assert served == [False, False, True]


def test_site_bits_quantize_what_is_otherwise_in_floating_point():
    spec = QuantSpec(None, None, site_bits=(("weight", 4),))
    layer = Dense(6, quant=spec)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    params = {"kernel": x.T[:, :1] * jnp.arange(1.0, 7.0)[None], "bias": jnp.zeros(6)}
    out, _ = layer.apply({"params": params}, x, mutable=[RANGES])
    kernel = params["kernel"]
    grid = make_grid(kernel.min(), kernel.max(), 4, symmetric=True)
    np.testing.assert_allclose(values(out), x @ fake_quantize(kernel, grid), atol=1e-6)


@pytest.mark.parametrize("backend", ["simulated", "int8"])
def test_a_site_left_out_is_the_identity(backend):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    skipped = Site(QuantSpec(float_sites=".*", backend=backend))
    out, updated = skipped.apply({}, x, mutable=[RANGES])
    assert out is x
    assert not updated


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_a_model_with_every_site_left_out_is_the_float_one(family):
    case, inputs = make_case(family, QuantSpec(head=True, float_sites=".*")), inputs_of(family)
    assert not case.ranges
    # Whole matrices in the order of the others; a fused program rounds in another.
    case = case._replace(plain=with_config(case.plain, attention_kernel="unfused"))
    floats = case.in_float(*inputs)
    np.testing.assert_array_equal(check_agreement(case, *inputs), floats)
    np.testing.assert_array_equal(case.in_simulation(*inputs), floats)


def test_a_layer_left_out_has_no_ranges():
    model, params = small_model("opt", num_layers=2)
    case = make_case("opt", QuantSpec(float_sites="layer_1/.*"), params=params, num_layers=2)
    assert "layer_1" not in case.ranges
    assert {x.dtype for x in jax.tree.leaves(case.codes["layer_1"])} == {jnp.dtype("float32")}
    inputs = inputs_of("opt")
    found = check_agreement(case, *inputs)
    everywhere = with_quant(model, QuantSpec())
    other = jax.jit(lambda p, *x: everywhere.apply({"params": p}, *x, mutable=[RANGES])[0])
    assert np.abs(found - other(params, *inputs)).max() > 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.5, 2.0), (-2.0, -0.5), (1e-12, 1e-12)])
def test_codes_stay_on_narrow_and_one_sided_grids(bits, symmetric, low, high):
    grid = make_grid(jnp.float32(low), jnp.float32(high), bits, symmetric=symmetric)
    x = np.linspace(low - 1.0, high + 1.0, 41, dtype=np.float32)
    simulated, native = quantize(x, grid), quantize_int8(x, grid)
    np.testing.assert_array_equal(simulated.values(), native.values())
    assert np.isfinite(native.values()).all()
    assert len(np.unique(native.codes)) <= 2**bits
    # 0 is on every grid.
    assert float(quantize_int8(jnp.float32(0.0), grid).values()) == 0.0
