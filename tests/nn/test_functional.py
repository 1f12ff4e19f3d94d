"""`qf.dot_product_attention` against JAX's own and against the formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import Mask, UserError, dot_product_attention, make_softmax

B, T, S, H, K = 2, 9, 11, 4, 8
CLIPPED = make_softmax("clipped", gamma=-0.05, zeta=1.02)


def operands(groups: int = H):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((B, T, H, K), (B, S, groups, K), (B, S, groups, K))
    return [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.2},
    "causal": {"is_causal": True},
    "bias": {"bias": jax.random.normal(jax.random.key(5), (1, H, T, S))},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(6), 0.7, (B, 1, T, S))},
    "keys": {"mask": jnp.arange(S)[None, None, None] < jnp.array([5, 11])[:, None, None, None]},
    "keys of all": {"mask": (jnp.arange(S) < 5)[None, None, None]},
    "lengths": {"key_value_seq_lengths": jnp.array([4, 11])},
    "causal lengths": {"key_value_seq_lengths": jnp.array([4, 11]), "is_causal": True},
    "window": {"local_window_size": (3, 5)},
    "window, lengths": {"local_window_size": 5, "key_value_seq_lengths": jnp.array([7, 11])},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("groups", [H, 2])
def test_vanilla_is_that_of_jax(name, groups):
    q, k, v = operands(groups)

    def both(attend):
        def total(*qkv):
            context = attend(*qkv, **OPTIONS[name])
            return jnp.sum(context**2), context

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    found, expected = both(dot_product_attention), both(jax.nn.dot_product_attention)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


def test_without_a_batch():
    q, k, v = (x[0] for x in operands())
    np.testing.assert_allclose(
        dot_product_attention(q, k, v, softmax=CLIPPED),
        dot_product_attention(q[None], k[None], v[None], softmax=CLIPPED)[0],
    )


def formula(q, k, v, seen):
    scores = np.einsum("BTHK,BSHK->BHTS", q, k, dtype=np.float64) / np.sqrt(K)
    exps = np.exp(scores) * seen
    total = exps.sum(-1, keepdims=True)
    probs = exps / np.where(total == 0, 1, total)
    return np.einsum("BHTS,BSHK->BTHK", np.clip(1.07 * probs - 0.05, 0, 1), v)


@pytest.mark.parametrize("implementation", ["auto", "unfused", "blockwise"])
def test_clipped_is_the_formula(implementation):
    q, k, v = operands()
    segments = jnp.sort(jax.random.randint(jax.random.key(7), (B, S), 0, 3), axis=1)
    mask = Mask(jnp.arange(S)[None] < jnp.array([[9], [11]]), True, segments[:, :T], segments)
    seen = (segments[:, :T, None] == segments[:, None]) & np.tril(np.ones((1, T, S), bool))
    seen = np.asarray(seen & mask.visible_BxS[:, None])[:, None]
    found = dot_product_attention(
        q, k, v, mask=mask, softmax=CLIPPED, implementation=implementation
    )
    np.testing.assert_allclose(found, formula(q, k, v, seen), atol=1e-6)
    np.testing.assert_array_equal(mask.dense(T, S), seen)


def test_rows_of_padding_are_zero_and_give_no_gradient():
    q, k, v = operands()
    lengths = jnp.array([3, 9])

    def total(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, query_seq_lengths=lengths))

    out = dot_product_attention(q, k, v, query_seq_lengths=lengths)
    np.testing.assert_array_equal(out[0, 3:], 0.0)
    assert np.abs(out[0, :3]).min() > 0
    np.testing.assert_array_equal(jax.grad(total)(q, k, v)[0, 3:], 0.0)


@pytest.mark.parametrize("implementation", ["unfused", "blockwise"])
def test_dropout_keeps_the_mean(implementation):
    q, k, v = operands()

    @jax.jit
    def draw(key):
        return dot_product_attention(
            q, k, v, dropout_rate=0.5, dropout_key=key, implementation=implementation
        )

    draws = [draw(key) for key in jax.random.split(jax.random.key(1), 500)]
    clean = dot_product_attention(q, k, v)
    deviation = np.std(draws, axis=0) / np.sqrt(len(draws))
    # 576 entries: a fifth standard error would be met once in 3000 such tests.
    assert np.all(np.abs(np.mean(draws, axis=0) - clean) < 5 * deviation)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dropout_rate": 0.1}, "needs a dropout_key"),
        ({"implementation": "blockwise", "bias": jnp.zeros((1, 1, T, S))}, "cannot add a bias"),
        ({"implementation": "gpu"}, "needs a GPU, found cpu"),
        ({"softmax": make_softmax(sink="learned")}, "needs the logits of its sinks"),
        ({"mask": Mask(query_segments_BxT=jnp.zeros((B, T)))}, "segments of queries and of keys"),
    ],
)
def test_errors_are_sentences(options, sentence):
    with pytest.raises(UserError, match=sentence):
        dot_product_attention(*operands(), **options)


def test_heads_that_do_not_fit():
    q, k, v = operands()
    with pytest.raises(UserError, match=r"must divide that of query heads, found 3 and 4"):
        dot_product_attention(q, k[:, :, :3], v[:, :, :3])


def test_a_mask_agrees_with_its_matrix():
    """Every combination of padding, causality and segments, by ids as kernels compare them."""
    visible = jnp.arange(S)[None] < jnp.array([[4], [S]])
    segments = jnp.sort(jax.random.randint(jax.random.key(7), (B, S), 0, 3), axis=1)
    for padding, causal, split in itertools.product([False, True], repeat=3):
        mask = Mask(
            visible if padding else None,
            causal,
            *((segments[:, :T], segments) if split else (None, None)),
        )
        q, k, v = operands()
        one, two = (
            dot_product_attention(q, k, v, mask=mask, implementation=way)
            for way in ("unfused", "blockwise")
        )
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"softmax": jax.nn.softmax}, "softmax must be what qf.make_softmax gives, found softmax"),
        ({"softmax": "clipped"}, "qf.make_softmax gives, found 'clipped'"),
        ({"implementation": "flash"}, "implementation must be one of auto, .*'flash'"),
        (
            {"mask": jnp.ones((T, S - 1))},
            r"mask must broadcast to .* \(2, 4, 9, 11\), found \(9, 10",
        ),
        ({"value": jnp.ones((B, S + 1, H, K))}, "the number of keys must be the same"),
        ({"query": jnp.ones((B, T, H, K), jnp.int32)}, "must be floats, found int32"),
    ],
)
def test_what_cannot_be_computed_is_said(changes, sentence):
    q, k, v = operands()
    with pytest.raises(UserError, match=sentence):
        dot_product_attention(**({"query": q, "key": k, "value": v} | changes))


@pytest.mark.parametrize("implementation", [None, "auto", "unfused"])
def test_nothing_gives_nothing(implementation):
    nothing = jnp.zeros((0, T, H, K))
    found = dot_product_attention(
        nothing, nothing, nothing, softmax=CLIPPED, implementation=implementation
    )
    assert found.shape == nothing.shape


def test_names_of_jax():
    for ours, theirs in (("auto", None), ("unfused", "xla")):
        one, two = (dot_product_attention(*operands(), implementation=x) for x in (ours, theirs))
        np.testing.assert_array_equal(one, two)
