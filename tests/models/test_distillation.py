"""Distances of a student to its teacher against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.models.distillation import Outputs, distances, divergence, outputs, spread
from quantizable_flax.models.features import pooled
from tests.small import small_batch, small_model

RNG = np.random.default_rng(0)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_divergence_is_that_of_the_distributions():
    teacher, student = RNG.normal(0.0, 3.0, (2, 4, 5, 7))
    p, q = log_softmax(teacher), log_softmax(student)
    expected = (np.exp(p) * (p - q)).sum(-1).mean(-1)
    np.testing.assert_allclose(
        divergence(jnp.float32(teacher), jnp.float32(student)), expected, rtol=1e-5
    )


def test_distances_are_the_formulas():
    ours, theirs = RNG.normal(size=(2, 3, 6, 8))
    visible = np.arange(6) < np.array([[6], [4], [1]])
    found = distances(
        *(
            Outputs(pooled(jnp.float32(x), jnp.asarray(visible), "mean"), None)
            for x in (ours, theirs)
        )
    )
    error = ((ours - theirs) ** 2).mean(-1)
    np.testing.assert_allclose(found.hidden_B, (error * visible).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens_B, [6, 4, 1])
    a, b = ((x * visible[..., None]).sum(1) / visible.sum(1)[:, None] for x in (ours, theirs))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found.pooled_B, 1 - cosine, rtol=1e-5)
    assert found.logits_B is None


@pytest.mark.parametrize("count", [1, 3, 4, 100])
def test_positions_are_visible_and_spread_evenly(count):
    # The value of a position is its number; padding on either side.
    x = jnp.broadcast_to(jnp.arange(12.0)[None, :, None], (3, 12, 1))
    starts, ends = np.array([[0], [0], [5]]), np.array([[12], [7], [12]])
    visible = (np.arange(12) >= starts) & (np.arange(12) < ends)
    chosen = np.asarray(spread(x, jnp.asarray(visible), count)[..., 0])
    assert chosen.shape == (3, min(count, 12))
    for row, start, end in zip(chosen, starts[:, 0], ends[:, 0], strict=True):
        assert np.all((row >= start) & (row < end))
        assert np.all(np.diff(row) >= 0)
        counts = np.bincount(row.astype(int) - start, minlength=end - start)
        assert counts.max() - counts.min() <= 1  # each about as often as any other
        assert abs(row.mean() - (start + end - 1) / 2) <= 1.0


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_logits_are_those_of_the_model_at_all_positions(family):
    model, params = small_model(family)
    batch = small_batch(family)
    found = model.apply({"params": params}, batch, method=lambda *a: outputs(*a, positions=100))
    image = batch.get("images")
    arguments = (batch["input_ids"],) if image is None else (image,)
    expected = model.apply({"params": params}, *arguments)
    expected = expected[:, None] if expected.ndim == 2 else expected
    np.testing.assert_allclose(found.logits_BxPxV, expected, rtol=1e-5, atol=1e-5)


def test_no_positions_no_head_no_logits():
    model, params = small_model("bert")
    headless, _ = small_model("bert", head="none")
    batch = small_batch("bert")
    for module, positions in ((model, 0), (headless, 4)):
        found = jax.eval_shape(
            lambda p, m=module, n=positions: m.apply(
                {"params": p}, batch, method=lambda *a: outputs(*a, positions=n)
            ),
            params,
        )
        assert found.logits_BxPxV is None
