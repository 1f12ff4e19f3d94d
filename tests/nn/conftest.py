"""Shared by the attention tests."""

import jax
import pytest


@pytest.fixture(scope="session")
def hidden() -> jax.Array:
    """[B, T, D] = [2, 6, 16]."""
    return jax.random.normal(jax.random.key(3), (2, 6, 16))
