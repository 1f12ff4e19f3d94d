"""The drop-in for `flax.linen.MultiHeadDotProductAttention`."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    module = MultiHeadAttention(HEADS, softmax=softmax_fn)
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
    # The two may be programs of another order: a stretched probability near 0 keeps few digits.
    np.testing.assert_allclose(noisy[survivors], 2.0 * clean[survivors], rtol=1e-5, atol=1e-7)
    alive = clean != 0.0
    both = alive[0] & alive[1]
    assert np.array_equal(survivors[0][both], survivors[1][both]) == broadcast


def test_bias_is_added_to_the_scores():
    q = jnp.zeros((1, 2, 1, 4))
    v = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 1, 4))
    bias = jnp.array([0.0, jnp.log(3.0)])[None, None, None]
    np.testing.assert_allclose(attention_fn("vanilla")(q, q, v, bias=bias), 0.75, rtol=1e-6)


def test_precision_reaches_both_products(variables, hidden):
    module = flax_module(attention_fn=attention_fn("vanilla"), precision="high")  # no default
    lowered = jax.jit(module.apply).lower(variables, hidden).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 6  # query, key, value, scores, context, output
    assert all("[HIGH, HIGH]" in line for line in products)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_that_of_the_computation(variables, hidden, dtype):
    ours = flax_module(attention_fn=attention_fn("vanilla"), dtype=dtype)
    theirs = flax_module(dtype=dtype)
    actual, expected = (module.apply(variables, hidden) for module in (ours, theirs))
    assert actual.dtype == expected.dtype == dtype
    # bfloat16 has 8 bits: theirs rounds scores and probabilities to it, ours does not.
    limit = 1e-6 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(actual, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_operands_of_several_dtypes_are_promoted_as_in_flax(dtype):
    q = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert attention_fn("vanilla")(q, q.astype(jnp.float32), q).dtype == jnp.float32
        assert attention_fn("vanilla")(q, q.astype(jnp.float32), q, dtype=dtype).dtype == dtype


def test_weights_are_sown_after_the_clip_and_before_dropout(variables, hidden):
    def sown(module, **options):
        options |= {"mask": MASK, "sow_weights": True, "mutable": ["intermediates"]}
        _, kept = module.apply(variables, hidden, **options)
        (weights,) = kept["intermediates"]["attention_weights"]
        return weights

    probs = sown(flax_module())
    np.testing.assert_allclose(
        sown(flax_module(attention_fn=attention_fn("vanilla"))), probs, rtol=1e-5, atol=1e-6
    )
    clipping = flax_module(attention_fn=attention_fn(gamma=-0.2), dropout_rate=0.5)
    found = sown(clipping, deterministic=False, dropout_rng=jax.random.key(1))
    np.testing.assert_allclose(found, jnp.clip(1.2 * probs - 0.2, 0.0, 1.0), rtol=1e-5, atol=1e-6)


def test_causal_flag_is_a_mask():
    q, k, v = jax.random.normal(jax.random.key(4), (3, 2, 6, HEADS, 8))
    attend = attention_fn(gamma=-0.05)
    expected = attend(q, k, v, mask=MASK)
    # One is a fused program, the other goes by the whole mask.
    np.testing.assert_allclose(attend(q, k, v, is_causal=True), expected, atol=1e-6)
    keys = (jnp.arange(6) < 4)[None, None, None]
    both = attend(q, k, v, mask=keys.astype(jnp.float32), is_causal=True)
    np.testing.assert_allclose(both, attend(q, k, v, mask=MASK & keys), atol=1e-6)


def test_queries_that_see_nothing_get_what_is_asked_for():
    q, k, v = jax.random.normal(jax.random.key(5), (3, 1, 4, HEADS, 8))
    mask = jnp.arange(4)[:, None] > 1  # the first two queries see nothing
    zero, uniform = (
        attention_fn("vanilla", blind_queries=kind)(q, k, v, mask=mask)
        for kind in ("zero", "uniform")
    )
    np.testing.assert_array_equal(zero[:, :2], 0.0)
    mean = np.broadcast_to(v.mean(1, keepdims=True), zero[:, :2].shape)
    np.testing.assert_allclose(uniform[:, :2], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(zero[:, 2:], uniform[:, 2:])


def test_products_of_the_caller_are_refused(variables, hidden):
    def einsum():
        return jnp.einsum

    module = flax_module(
        attention_fn=attention_fn("vanilla"),
        qk_attn_weights_einsum_cls=einsum,
        attn_weights_value_einsum_cls=einsum,
    )
    with pytest.raises(UserError, match="found qk_attn_weights_einsum: leave it out"):
        module.apply(variables, hidden)
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(UserError, match="found einsum_dot_general"):
        attention_fn("vanilla")(x, x, x, einsum_dot_general=jax.lax.dot_general)


def test_an_unknown_keyword_is_named():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(TypeError, match="presicion"):
        attention_fn("vanilla")(x, x, x, presicion="highest")


def test_every_keyword_of_flax_is_known():
    taken = inspect.signature(attention_fn("vanilla")).parameters
    assert set(inspect.signature(nn.dot_product_attention).parameters) <= set(taken)
    of_nnx = set(inspect.signature(nnx.dot_product_attention).parameters)
    assert of_nnx - {"promote_dtype"} <= set(taken)  # which no module of theirs passes


def test_wrong_options_are_refused_when_made_not_when_called():
    with pytest.raises(UserError, match="gamma <= 0"):
        attention_fn("clipped", gamma=0.5)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("sow_weights", [False, True])
def test_vanilla_equals_that_of_nnx(options, sow_weights, hidden):
    module = nnx.MultiHeadAttention(HEADS, 16, decode=False, rngs=nnx.Rngs(0), **options)
    for mask in (None, MASK):
        outputs, weights = [], []
        for function in (nnx.dot_product_attention, attention_fn("vanilla")):
            module.attention_fn = function
            watched = nnx.capture(module, nnx.Intermediate)
            out, sown = watched(hidden, mask=mask, sow_weights=sow_weights)
            outputs.append(out)
            weights.append(sown)
        for ours, theirs in (outputs[::-1], *zip(*map(jax.tree.leaves, weights), strict=True)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert len(jax.tree.leaves(weights)) == 2 * sow_weights


def test_nnx_decodes_and_drops_out(hidden):
    attend = attention_fn(gamma=-0.1)
    whole = nnx.MultiHeadAttention(
        HEADS, 16, decode=False, dropout_rate=0.5, attention_fn=attend, rngs=nnx.Rngs(0)
    )
    expected = whole(hidden, is_causal=True, deterministic=True)
    assert np.abs(whole(hidden, is_causal=True, deterministic=False) - expected).max() > 0
    steps = nnx.MultiHeadAttention(HEADS, 16, decode=True, attention_fn=attend, rngs=nnx.Rngs(0))
    steps.init_cache(hidden.shape)
    for i in range(hidden.shape[1]):
        found = steps(hidden[:, i : i + 1])
        np.testing.assert_allclose(found, expected[:, i : i + 1], rtol=1e-5, atol=1e-6)


def test_heads_that_cannot_be_shared_are_refused():
    q, k = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 2, 3, 8))
    with pytest.raises(UserError, match="must divide that of query heads, found 3 and 4"):
        attention_fn("vanilla")(q, k, k)
