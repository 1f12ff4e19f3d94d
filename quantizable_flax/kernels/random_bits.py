"""Dropout by a counter: whether an entry is kept is a function of its place and the seed alone.

So forward and backward passes, blocks of any size, kernels and parts of a mesh agree without
storing a mask. The mixer is two rounds of multiply and xorshift with constants of Chris Wellons'
`lowbias32` search (github.com/skeeto/hash-prospector); a row brings two words, one of which
enters between the rounds, so that no two rows run through the same sequence.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 24  # of the number that is compared with the rate


def _mix(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def row_words(
    seed: jax.Array | Sequence[jax.Array], batch: jax.Array, head: jax.Array, query: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two words of a row of probabilities, uint32.

    Args:
      seed: uint32, two of them along the first axis.
      batch, head, query: integer places in the whole, shapes that broadcast together.
    """
    batch, head, query = (jnp.asarray(x).astype(jnp.uint32) for x in (batch, head, query))
    word = _mix(seed[0] + batch * np.uint32(0x9E3779B1))
    word = _mix(word + head * np.uint32(0x85EBCA77))
    word = _mix(word + query * np.uint32(0xC2B2AE3D))
    return word, _mix(word ^ seed[1])


def kept(words: tuple[jax.Array, jax.Array], keys: jax.Array, dropout_rate: float) -> jax.Array:
    """Which entries dropout keeps, bool; words and key indices (from 0) broadcast together."""
    x = words[0] + keys.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD) + words[1]
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    number = ((x ^ (x >> 15)) >> (32 - _BITS)).astype(jnp.int32)
    return number >= round(dropout_rate * 2**_BITS)
