"""Text from the int8 model: the simulation's tokens, from a cache of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.models.generation import Sampling, generate
from tests.ptq.int8_case import make_case

PROMPTS = [[2, 17, 40, 8, 91], [2, 5], [2, 60, 33]]
NEW = 6


@pytest.mark.parametrize(
    ("attention", "sizes", "spec"),
    [
        pytest.param(
            {"softmax": "clipped", "gamma": -0.1, "gate": "linear"}, {}, {}, marks=pytest.mark.slow
        ),
        (
            {"gate": "value", "qk_norm": True, "softmax": "clipped", "gamma": -0.05},
            {"num_registers": 2},
            {},
        ),
        pytest.param(
            {},
            {"pre_layer_norm": False, "embed_size": 16},
            {"activation_ranges": "token"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tokens_are_those_of_the_simulation(attention, sizes, spec):
    case = make_case("opt", QuantSpec(head=True, **spec), attention, spread=0.5, **sizes)
    for sampling in (Sampling(), Sampling(temperature=2.0)):
        options = {"max_new_tokens": NEW, "sampling": sampling}
        expected = generate(case.simulated, case.params, PROMPTS, ranges=case.ranges, **options)
        assert generate(case.native, case.codes, PROMPTS, **options) == expected
        assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    # Alone or padded to the length of another: the same tokens.
    alone = [generate(case.native, case.codes, PROMPTS[1:2], max_new_tokens=NEW)[0]]
    assert generate(case.native, case.codes, PROMPTS, max_new_tokens=NEW)[1:2] == alone


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        ({}, jnp.int8, jnp.int8),
        ({"site_bits": ((".*/key/output", 16),)}, jnp.float32, jnp.int8),
        ({"float_sites": ".*/value/output"}, jnp.int8, jnp.float32),
        ({"activation_ranges": "token"}, jnp.float32, jnp.float32),
    ],
)
def test_cache_is_of_codes(spec, key, value):
    case = make_case("opt", QuantSpec(**spec))
    before = case.native.empty_cache(1, 4)
    ids = jnp.array([[2, 17, 40]])
    logits, updated = jax.jit(
        lambda codes, cache: case.native.apply(
            {"params": codes, "cache": cache},
            ids,
            jnp.arange(3)[None],
            jnp.array([[True, True, True, False]]),
            jnp.int32(0),
            method="extend",
            mutable=["cache"],
        )
    )(case.codes, before)
    for cache in (before, updated["cache"]):
        arrays = cache["layer_0"]["attention"]
        assert (arrays["key"].dtype, arrays["value"].dtype) == (key, value)
    assert np.any(np.asarray(arrays["key"][:, :3]) != 0)
    assert np.all(np.asarray(arrays["key"][:, 3]) == 0)
    whole = case.on_integers(ids)[:, -1]
    np.testing.assert_allclose(logits, whole, atol=1e-4 * np.abs(whole).max())
