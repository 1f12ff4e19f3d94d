"""Softmax and clipped softmax against the original, closed forms, and their own promises."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from quantizable_flax import SoftmaxConfig, UserError, clipped_softmax, make_softmax, softmax
from quantizable_flax.nn.softmax import BLIND_QUERIES
from tests.helpers import deviation, golden

# Both sides are float32 and sum 16 terms, in another order: some 1e-7 apart (measured 3e-7). A
# gradient loses a digit more where two large terms cancel.
FORWARD, BACKWARD = 1e-5, 1e-4
MASKS = ("none", "bert", "full", "causal")


@pytest.mark.parametrize("blind_queries", BLIND_QUERIES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", range(5))
def test_matches_the_original(case, kind, blind_queries):
    file = golden("softmax")
    gamma, zeta = file.config["gamma_eta"][case]
    mask = jnp.asarray(file[f"in/mask_{kind}"] == 0)
    scores, cot = jnp.asarray(file["in/scores"]), jnp.asarray(file["in/cot"])
    # A row that sees nothing is uniform in the original, and 0 here unless asked for that.
    compared = np.broadcast_to(mask.any(-1, keepdims=True), scores.shape)
    if blind_queries == "uniform":
        compared = np.ones_like(compared)
    softmax_fn = make_softmax("clipped", gamma=gamma, zeta=zeta, blind_queries=blind_queries)

    probs, backward = jax.vjp(lambda s: softmax_fn(s, mask), scores)
    (grad,) = backward(cot)

    assert np.all(np.asarray(probs)[~compared] == 0.0)
    assert np.all(np.asarray(grad)[~compared] == 0.0)
    probs, grad = np.asarray(probs), np.asarray(grad)
    assert deviation(probs * compared, file[f"out/{case}/{kind}"] * compared) < FORWARD
    assert deviation(grad * compared, file[f"grad/{case}/{kind}"] * compared) < BACKWARD


@pytest.mark.parametrize("stretch", [{}, {"gamma": -0.1}, {"gamma": -0.5}, {"zeta": 1.5}])
@pytest.mark.parametrize("causal", [False, True])
def test_uniform_blind_queries_change_no_other_row(causal, stretch):
    # Padding on the left: the first two queries see nothing, not even themselves.
    mask = jnp.tril(jnp.ones((5, 5), bool)) & (jnp.arange(5) >= 2)[None]
    scores = 9.0 * jax.random.normal(jax.random.key(0), (2, 3, 5, 5))
    options = {"kind": "clipped" if stretch else "vanilla", **stretch}
    uniform = make_softmax(**options, blind_queries="uniform", causal=causal)(scores, mask)
    zero = make_softmax(**options)(scores, mask)
    np.testing.assert_array_equal(uniform[..., 2:, :], zero[..., 2:, :])
    gamma, zeta = stretch.get("gamma", 0.0), stretch.get("zeta", 1.0)
    expected = max((zeta - gamma) / 5 + gamma, 0.0)
    np.testing.assert_allclose(uniform[..., :2, :], expected, rtol=1e-6)
    np.testing.assert_array_equal(zero[..., :2, :], 0.0)


@pytest.mark.parametrize("gamma", [0.0, -0.1])
def test_row_without_a_visible_key_is_zero_with_finite_gradients(gamma):
    scores = jnp.array([[3.0, -1.0, 1e30], [0.0, 0.0, 0.0]])
    mask = jnp.array([[False] * 3, [True, True, False]])

    def total(scores):
        return jnp.sum(clipped_softmax(scores, mask, gamma=gamma) ** 2)

    probs = clipped_softmax(scores, mask, gamma=gamma)
    assert np.all(np.asarray(probs[0]) == 0.0)
    assert np.all(np.asarray(probs[:, 2]) == 0.0)
    assert np.all(np.isfinite(jax.grad(total)(scores)))


@pytest.mark.parametrize("zeta", [1.0, 1.3])
def test_masked_keys_are_exactly_zero(zeta):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(30.0 * rng.normal(size=(4, 2, 8, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((4, 1, 8, 8)) < 0.5)
    probs = clipped_softmax(scores, mask, gamma=0.0, zeta=zeta)
    assert np.all(np.where(mask, 0.0, probs) == 0.0)


@pytest.mark.parametrize("fn", [softmax, make_softmax("clipped", gamma=-0.05)])
def test_bfloat16_scores_give_float32_probabilities(fn):
    scores = jax.random.normal(jax.random.key(0), (2, 16, 16)).astype(jnp.bfloat16)
    probs = fn(scores, None)
    assert probs.dtype == jnp.float32
    np.testing.assert_array_equal(probs, fn(scores.astype(jnp.float32), None))


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.03, 1.0), (0.0, 1.2), (-0.1, 1.1)])
def test_jacobian_has_the_closed_form(gamma, zeta):
    scores = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 6.0])
    p = np.exp(scores - scores.max())
    p /= p.sum()
    stretched = (zeta - gamma) * p + gamma
    inside = (stretched >= 0.0) & (stretched <= 1.0)
    assert not inside.all()  # or the test would say nothing about clipping
    expected = inside[:, None] * (zeta - gamma) * (np.diag(p) - np.outer(p, p))

    jacobian = jax.jacobian(lambda s: clipped_softmax(s, gamma=gamma, zeta=zeta))
    np.testing.assert_allclose(jacobian(jnp.asarray(scores, jnp.float32)), expected, atol=1e-6)


def test_gradient_at_a_bound_is_whole():
    # Two equal scores: p = 1/2, and gamma = -1 puts both exactly on 0.
    probs, backward = jax.vjp(lambda s: clipped_softmax(s, gamma=-1.0), jnp.zeros(2))
    (grad,) = backward(jnp.array([1.0, 0.0]))
    assert np.all(np.asarray(probs) == 0.0)
    np.testing.assert_allclose(grad, [0.5, -0.5])


@hypothesis.given(
    scores=hnp.arrays(np.float32, (3, 8), elements=st.floats(-50, 50, width=32)),
    mask=hnp.arrays(bool, (3, 8)),
    gamma=st.floats(-0.5, 0.0),
    zeta=st.floats(1.0, 1.5),
)
def test_output_is_a_clipped_stretch(scores, mask, gamma, zeta):
    probs = np.asarray(
        clipped_softmax(jnp.asarray(scores), jnp.asarray(mask), gamma=gamma, zeta=zeta)
    )
    assert probs.dtype == np.float32
    assert np.all((probs >= 0.0) & (probs <= 1.0))
    assert np.all(probs[~mask] == 0.0)
    plain = np.asarray(softmax(scores, mask), np.float64)
    threshold, slack = -gamma / (zeta - gamma), 1e-6
    assert np.all(probs[plain < threshold - slack] == 0.0)
    assert np.all(probs[plain > threshold + slack] > 0.0)


@hypothesis.given(
    scores=hnp.arrays(np.float32, (2, 6), elements=st.floats(-20, 20, width=32)),
    shift=st.floats(-10, 10),
    gamma=st.floats(-0.3, 0.0),
)
def test_a_shift_of_all_scores_changes_nothing(scores, shift, gamma):
    before = clipped_softmax(jnp.asarray(scores), gamma=gamma)
    after = clipped_softmax(jnp.asarray(scores + np.float32(shift)), gamma=gamma)
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_alpha_gives_gamma_by_the_training_length():
    scores = jax.random.normal(jax.random.key(1), (4, 32))
    by_alpha = make_softmax("clipped", alpha=4.0, seq_len=128)(scores, None)
    np.testing.assert_array_equal(by_alpha, clipped_softmax(scores, gamma=-4.0 / 128))


@pytest.mark.parametrize("blind_queries", BLIND_QUERIES)
def test_a_length_normalised_row_is_clipped_by_the_keys_that_it_sees(blind_queries):
    scores = 2.0 * jax.random.normal(jax.random.key(1), (2, 3, 6, 6))
    # Causal, with padding on the left of the second text, whose first two queries see nothing.
    padding = np.arange(6) < np.array([0, 2])[:, None, None, None]
    mask = jnp.asarray(np.tril(np.ones((6, 6), bool)) & ~padding)
    options = {"zeta": 1.05, "blind_queries": blind_queries}
    by_row = make_softmax("clipped", alpha=0.5, length_normalised=True, **options)(scores, mask)
    for b in range(2):
        for t in range(6):
            seen = int(mask[b, 0, t].sum()) or (6 if blind_queries == "uniform" else 1)
            fixed = make_softmax("clipped", gamma=-0.5 / seen, **options)
            one = fixed(scores[b : b + 1, :, t : t + 1], mask[b : b + 1, :, t : t + 1])
            np.testing.assert_allclose(by_row[b, :, t], one[0, :, 0], rtol=1e-6, atol=1e-7)
    assert 0.1 < np.mean(np.asarray(by_row)[jnp.broadcast_to(mask, scores.shape)] == 0.0) < 0.9
    # Without a mask every row sees all keys, whatever the training length was.
    unmasked = make_softmax("clipped", alpha=0.5, length_normalised=True, seq_len=128)(scores)
    np.testing.assert_array_equal(unmasked, clipped_softmax(scores, gamma=-0.5 / 6))


def test_without_stretch_clipped_is_vanilla():
    scores = jax.random.normal(jax.random.key(2), (4, 32))
    np.testing.assert_array_equal(make_softmax("clipped", gamma=0.0)(scores, None), softmax(scores))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"kind": "cliped"},
            r"vanilla, clipped, found 'cliped' \(did you mean 'clipped'\?\)",
        ),
        ({"kind": "clipped"}, "needs gamma, alpha or zeta"),
        ({"kind": "clipped", "gamma": 0.1}, "gamma <= 0 and zeta >= 1, found gamma=0.1, zeta=1.0"),
        ({"kind": "clipped", "zeta": 0.9}, "gamma <= 0 and zeta >= 1, found gamma=0.0, zeta=0.9"),
        ({"kind": "clipped", "gamma": -0.1, "alpha": 4.0}, "found gamma=-0.1 and alpha=4.0"),
        ({"kind": "clipped", "alpha": 4.0}, "found alpha=4.0, sequence length None"),
        ({"kind": "clipped", "alpha": -1.0, "seq_len": 8}, "found alpha=-1.0, sequence length 8"),
        ({"kind": "vanilla", "gamma": -0.1}, "belong to softmax='clipped'"),
        ({"length_normalised": True}, "length_normalised belong to softmax='clipped'"),
        ({"kind": "clipped", "length_normalised": True}, "needs alpha > 0.* found alpha=None"),
        ({"kind": "clipped", "length_normalised": True, "alpha": 0.0}, "found alpha=0.0, gamma=N"),
        (
            {"kind": "clipped", "length_normalised": True, "alpha": 0.5, "gamma": -0.1},
            "found alpha=0.5, gamma=-0.1: set alpha alone",
        ),
        ({"blind_queries": "unifrom"}, r"zero, uniform, found 'unifrom' \(did you mean 'uniform'"),
    ],
)
def test_wrong_options_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        make_softmax(**arguments)


def test_configs_that_do_the_same_are_equal():
    by_alpha = make_softmax("clipped", alpha=4.0, seq_len=128, causal=True)
    assert by_alpha == SoftmaxConfig("clipped", gamma=-4.0 / 128)
    assert hash(by_alpha) == hash(make_softmax("clipped", gamma=-4.0 / 128, zeta=1.0))
    assert make_softmax(blind_queries="uniform") != make_softmax() == SoftmaxConfig()


def test_an_equal_config_is_compiled_once():
    attend = jax.jit(lambda scores, config: config(scores), static_argnames="config")
    scores = jnp.zeros((2, 4))
    for config in (make_softmax("clipped", gamma=-0.1), SoftmaxConfig("clipped", -0.1)):
        attend(scores, config=config)
    assert attend._cache_size() == 1


def test_a_vanilla_config_has_no_stretch():
    with pytest.raises(UserError, match=r"belongs to softmax='clipped', found gamma=-0\.1"):
        SoftmaxConfig(gamma=-0.1)


@pytest.mark.parametrize(
    "stretch", [{"gamma": 0.01}, {"zeta": 0.99}, {"alpha": -0.5}, {"alpha": 0.5, "gamma": -0.1}]
)
def test_wrong_stretch_is_refused_by_the_function_too(stretch):
    with pytest.raises(UserError, match=r"needs (gamma <= 0 and zeta >= 1|alpha >= 0 in place)"):
        clipped_softmax(jnp.zeros(3), **stretch)
