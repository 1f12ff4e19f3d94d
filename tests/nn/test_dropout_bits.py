"""Which generator dropout draws from; on many devices see tests/training/test_mesh.py."""

import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError
from quantizable_flax.nn.dropout_bits import dropout_key
from quantizable_flax.runtime.mesh import make_mesh

MESH = make_mesh(default_config().mesh, jax.devices()[:1])


class Elsewhere:
    """As much of a mesh of one device of a platform as is looked at."""

    shape = MESH.shape

    def __init__(self, platform: str):
        self.devices = np.array([types.SimpleNamespace(platform=platform)])


def text_of(bits: str, mesh: Any = MESH) -> str:
    def mask(step):
        key = jax.random.fold_in(dropout_key(bits, 0, mesh), step)
        return jax.random.bernoulli(key, 0.9, (4, 3))

    return jax.jit(mask).lower(1).as_text()


def test_threefry_is_the_generator_of_jax():
    for bits in ("threefry", "auto"):
        assert dropout_key(bits, 7, MESH) == jax.random.key(7)
        assert "rng_bit_generator" not in text_of(bits)
    assert "rng_bit_generator" in text_of("rbg")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_draw_by_themselves(platform):
    assert "rng_bit_generator" in text_of("auto", Elsewhere(platform))


def test_unknown_bits():
    with pytest.raises(UserError, match=r"train\.dropout_bits must be one of .*found 'rgb'"):
        dropout_key("rgb", 0, MESH)


def test_masks_follow_seed_and_step_and_drop_so_many():
    x = jnp.ones((64, 100))

    @jax.jit
    def dropped(seed, step):
        key = jax.random.fold_in(dropout_key("rbg", seed, MESH), step)
        return nn.Dropout(0.25, deterministic=False).apply({}, x, rngs={"dropout": key})

    first = dropped(0, 1)
    np.testing.assert_array_equal(first, dropped(0, 1))
    assert 0.23 < float(jnp.mean(first == 0.0)) < 0.27
    for other in (dropped(0, 2), dropped(1, 1)):
        assert 0.3 < float(jnp.mean(first != other)) < 0.45  # 2 * 0.25 * 0.75
