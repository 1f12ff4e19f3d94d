"""Mixup and CutMix against their formulas, and how often each is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.models.mixing import cutmix, mix, mixup

KEYS = jax.random.split(jax.random.key(0), 1000)
BATCH = 4
# Image b is b everywhere, so every pixel says whose it is.
IMAGES = jnp.broadcast_to(jnp.arange(float(BATCH))[:, None, None, None], (BATCH, 10, 12, 1))
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_share": 0.3, "probability": 0.9}


@functools.cache
def drawn(**options) -> tuple[np.ndarray, np.ndarray]:
    """(mixed images, own weights) for each of KEYS."""
    return jax.device_get(jax.jit(jax.vmap(lambda key: mix(IMAGES, key, **options)))(KEYS))


def is_whole(mixed: np.ndarray) -> np.ndarray:
    """Whether every pixel is that of one image or the other."""
    images = np.asarray(IMAGES)
    partners = images[::-1]
    return ((mixed == images) | (mixed == partners)).all(axis=(1, 2, 3, 4))


def assert_share(hits: np.ndarray, expected: float) -> None:
    """Five standard errors of a share."""
    assert abs(hits.mean() - expected) < 5.0 * np.sqrt(expected * (1 - expected) / hits.size)


def test_mixup_is_the_weighted_sum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 6, 6, 3)).astype(np.float32)
    mixed, own = mixup(jnp.asarray(x), jnp.asarray(y), jnp.float32(0.3))
    np.testing.assert_allclose(mixed, 0.3 * x + 0.7 * y, rtol=1e-6, atol=1e-6)
    assert own == np.float32(0.3)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_meets_the_reversed_batch_with_a_beta_weight(alpha):
    mixed, own = drawn(mixup_alpha=alpha, cutmix_alpha=0.0, cutmix_share=1.0, probability=1.0)
    weight = own[:, None, None, None, None]
    expected = weight * np.asarray(IMAGES) + (1.0 - weight) * np.asarray(IMAGES)[::-1]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    variance = 1.0 / (4.0 * (2.0 * alpha + 1.0))
    assert abs(own.mean() - 0.5) < 5.0 * np.sqrt(variance / len(own))
    np.testing.assert_allclose(own.var(), variance, rtol=0.1)


def test_cutmix_weighs_labels_by_the_pixels_left():
    mixed, own = drawn(mixup_alpha=0.0, cutmix_alpha=1.0, cutmix_share=0.0, probability=1.0)
    assert is_whole(mixed).all()
    kept = (mixed == np.asarray(IMAGES)).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(kept, np.broadcast_to(own[:, None], kept.shape), atol=1e-6)
    assert own.min() < 0.4
    assert own.max() == 1.0  # a box may be empty


@pytest.mark.parametrize("own", [0.2, 0.5, 0.9])
def test_cutmix_pastes_one_box_of_the_right_size(own):
    paste = jax.jit(jax.vmap(lambda key: cutmix(IMAGES, IMAGES[::-1], jnp.float32(own), key)[0]))
    pasted = np.asarray(paste(KEYS[:300]))[:, 0, :, :, 0] != 0.0  # image 0 is all 0
    rows, columns = pasted.any(2), pasted.any(1)
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None, :])
    for lines, size in ((rows, 10), (columns, 12)):
        assert (np.abs(np.diff(lines.astype(int), axis=1)).sum(1) <= 2).all()  # one run
        # Each side is sqrt(1 - own) of the image, in whole halves; the border may cut it.
        side = 2 * (int(size * np.sqrt(1.0 - own)) // 2)
        assert lines.sum(1).max() == side
        assert lines.sum(1).min() == side // 2  # a centre on the border
        assert lines.any(0).all()  # and everywhere in between


def test_kinds_are_drawn_by_their_shares():
    mixed, own = drawn(**BOTH)
    untouched = (mixed == np.asarray(IMAGES)).all(axis=(1, 2, 3, 4))
    # A CutMix with an empty box changes nothing either: its own draws say how often.
    _, boxes = drawn(mixup_alpha=0.0, cutmix_alpha=1.0, cutmix_share=0.0, probability=1.0)
    empty = (boxes == 1.0).mean()
    assert_share(untouched, 0.1 + 0.9 * 0.3 * empty)
    assert_share(is_whole(mixed), 0.1 + 0.9 * 0.3)
    assert np.all(own[untouched] == 1.0)


@pytest.mark.parametrize("changes", [{}, {"mixup_alpha": 0.0}, {"cutmix_alpha": 0.0}])
def test_probability_0_leaves_the_batch_alone(changes):
    mixed, own = drawn(**{**BOTH, **changes, "probability": 0.0})
    np.testing.assert_array_equal(mixed, np.broadcast_to(IMAGES, mixed.shape))
    assert np.all(own == 1.0)
