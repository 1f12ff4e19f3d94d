"""The drop-in for `flax.linen.MultiHeadDotProductAttention`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import MultiHeadAttention, UserError, attention_fn, make_softmax

HEADS = 4
MASK = jnp.tril(jnp.ones((6, 6), bool))[None, None]


def flax_module(**options):
    return nn.MultiHeadDotProductAttention(HEADS, **options)


@pytest.fixture(scope="module")
def variables():
    return flax_module().init(jax.random.key(0), jnp.zeros((2, 6, 16)))


def test_vanilla_equals_flax(variables, hidden):
    ours = flax_module(attention_fn=attention_fn("vanilla"))
    for mask in (None, MASK):
        actual = ours.apply(variables, hidden, mask=mask)
        expected = flax_module().apply(variables, hidden, mask=mask)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"softmax": "vanilla"}, {"gamma": -0.1, "zeta": 1.1}])
def test_equals_our_attention(options, hidden):
    kinds = {"softmax": "clipped", **options}
    softmax_fn = make_softmax(kinds.pop("softmax"), **kinds)
    module = MultiHeadAttention(HEADS, softmax_fn=softmax_fn)
    params = nn.meta.unbox(module.init(jax.random.key(0), hidden))["params"]

    def split(part):  # [D, H * K] -> [D, H, K], as flax keeps it
        return {name: x.reshape(*x.shape[:-1], HEADS, -1) for name, x in part.items()}

    flax_params = {name: split(params[name]) for name in ("query", "key", "value")}
    output = params["output"]
    kernel = output["kernel"].reshape(HEADS, -1, output["kernel"].shape[-1])
    flax_params["out"] = {"kernel": kernel, "bias": output["bias"]}
    theirs = flax_module(attention_fn=attention_fn(**options))
    np.testing.assert_allclose(
        theirs.apply({"params": flax_params}, hidden, mask=MASK),
        module.apply({"params": params}, hidden, MASK),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_comes_after_the_clip(broadcast):
    tokens, gamma = 64, -0.02
    q, k = jax.random.normal(jax.random.key(1), (2, 2, tokens, HEADS, tokens)) * 0.5
    eye = jnp.broadcast_to(jnp.eye(tokens)[None, :, None], q.shape)  # then the context is probs
    attend = attention_fn(gamma=gamma)
    options = {"broadcast_dropout": broadcast, "dropout_rng": jax.random.key(2)}
    clean = np.asarray(attend(q, k, eye, deterministic=True, dropout_rate=0.5, **options))
    noisy = np.asarray(attend(q, k, eye, dropout_rate=0.5, **options))
    assert (clean == 0.0).any()
    assert np.all(noisy[clean == 0.0] == 0.0)
    survivors = noisy != 0.0
    assert 0.4 < survivors.sum() / (clean != 0.0).sum() < 0.6
    np.testing.assert_allclose(noisy[survivors], 2.0 * clean[survivors], rtol=1e-6)
    alive = clean != 0.0
    both = alive[0] & alive[1]
    assert np.array_equal(survivors[0][both], survivors[1][both]) == broadcast


def test_bias_is_added_to_the_scores():
    q = jnp.zeros((1, 2, 1, 4))
    v = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 1, 4))
    bias = jnp.array([0.0, jnp.log(3.0)])[None, None, None]
    np.testing.assert_allclose(attention_fn("vanilla")(q, q, v, bias=bias), 0.75, rtol=1e-6)


def test_wrong_options_are_refused_when_made_not_when_called():
    with pytest.raises(UserError, match="gamma <= 0"):
        attention_fn("clipped", gamma=0.5)
