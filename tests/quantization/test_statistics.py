"""Outlier statistics against the original and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.quantization.statistics import inf_norm, kurtosis, zero_share
from tests.helpers import golden

FILE = golden("metrics_bert")


def test_kurtosis_matches_the_original():
    actual = kurtosis(jnp.asarray(FILE["kurtosis/x"]))
    np.testing.assert_allclose(actual, FILE["kurtosis/out"], rtol=1e-5)


def test_kurtosis_of_a_nearly_constant_row_matches_the_original():
    # The 1e-6 in the denominator rules here: the results are 0 and some 1e-8.
    actual = kurtosis(jnp.asarray(FILE["kurtosis_degenerate/x"]))
    np.testing.assert_allclose(actual, FILE["kurtosis_degenerate/out"], rtol=1e-4)


def test_statistics_are_per_sample_and_float32():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5)).astype(jnp.bfloat16)
    rows = np.asarray(x, np.float64).reshape(3, 20)
    centred = rows - rows.mean(1, keepdims=True)
    expected = (centred**4).mean(1) / (rows.std(1, ddof=1) ** 4 + 1e-6)
    np.testing.assert_allclose(kurtosis(x), expected, rtol=1e-5)
    np.testing.assert_allclose(inf_norm(x), np.abs(rows).max(1), rtol=1e-6)
    assert kurtosis(x).dtype == inf_norm(x).dtype == jnp.float32


def test_kurtosis_of_a_normal_tensor_is_three():
    x = jax.random.normal(jax.random.key(1), (1, 200_000))
    np.testing.assert_allclose(kurtosis(x), 3.0, rtol=0.03)


def test_zero_share_counts_what_the_mask_shows():
    probs = jnp.array([[[[0.0, 1.0], [0.5, 0.5]]], [[[0.0, 0.0], [0.0, 1.0]]]])
    np.testing.assert_allclose(zero_share(probs, None), [0.25, 0.75])
    mask = jnp.array([[[[True, False]]], [[[False, False]]]])
    np.testing.assert_allclose(zero_share(probs, mask), [0.5, 0.0])
