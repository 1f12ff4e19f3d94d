"""Attention's own promises: dropout, statistics, dtypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import MultiHeadAttention, UserError, make_softmax


@pytest.fixture(scope="module")
def with_dropout(hidden):
    softmax_fn = make_softmax("clipped", gamma=-0.2)
    module = MultiHeadAttention(4, softmax=softmax_fn, dropout_rate=0.5)
    return module, module.init(jax.random.key(0), hidden)


def test_dropout_comes_after_the_clip(with_dropout, hidden):
    module, variables = with_dropout
    _, kept = module.apply(
        variables,
        hidden,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda m, _: m.name == "probs" or isinstance(m, nn.Dropout),
        mutable=["intermediates"],
    )
    kept = kept["intermediates"]
    before, after = (np.asarray(kept[key]["__call__"][0]) for key in ("probs", "Dropout_0"))
    assert (before == 0.0).any()
    assert (before > 0.0).any()
    assert np.all(after[before == 0.0] == 0.0)
    survivors = after != 0.0
    assert 0 < survivors.sum() < (before > 0.0).sum()
    np.testing.assert_allclose(after[survivors], 2.0 * before[survivors], rtol=1e-6)


def test_dropout_needs_train_and_a_key(with_dropout, hidden):
    module, variables = with_dropout
    one, other = (
        module.apply(variables, hidden, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(module.apply(variables, hidden), module.apply(variables, hidden))
    with pytest.raises(Exception, match="dropout"):
        module.apply(variables, hidden, train=True)


def test_zero_share_counts_visible_keys_only(hidden):
    module = MultiHeadAttention(4, softmax=make_softmax("clipped", gamma=-0.2))
    variables = module.init(jax.random.key(0), hidden)
    mask = jnp.arange(6)[None, None, None, :] < 4
    _, kept = module.apply(
        variables,
        hidden,
        mask,
        capture_intermediates=lambda m, _: m.name == "probs",
        mutable=["intermediates", "stats"],
    )
    probs = np.asarray(kept["intermediates"]["probs"]["__call__"][0])
    expected = (probs[..., :4] == 0.0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(kept["stats"]["zero_share"], expected, rtol=1e-6)


def test_heads_must_divide_the_width(hidden):
    with pytest.raises(UserError, match="found 3 heads and hidden size 16"):
        MultiHeadAttention(3).init(jax.random.key(0), hidden)


def test_bfloat16_keeps_float32_params_and_probabilities(hidden):
    module = MultiHeadAttention(4, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), hidden)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    context, kept = module.apply(
        variables,
        hidden.astype(jnp.bfloat16),
        capture_intermediates=lambda m, _: m.name in ("scores", "probs"),
        mutable=["intermediates"],
    )
    assert context.dtype == jnp.bfloat16
    for name in ("scores", "probs"):
        assert kept["intermediates"][name]["__call__"][0].dtype == jnp.float32
