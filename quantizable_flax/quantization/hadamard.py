"""Rotation by a Hadamard matrix with random signs, before a grid (QuaRot, arXiv 2404.00456).

`x S H / sqrt(n)` with S a diagonal of random signs and H orthogonal rows of 1 and -1: a value that
stands alone is spread over all n channels, at 1 / sqrt(n) of its size. Without the signs the mean
of all channels would end up in the first one. n is 2^k, 12 * 2^k or 20 * 2^k.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.errors import UserError

PALEY = (12, 20)  # orders q + 1 of Paley's first construction, q a prime with 3 of 4 left over
PART = 64  # the largest power of two that is multiplied by at once


def rotate(x: jax.Array, axis: int) -> jax.Array:
    """Rotates the channels of an axis; computed in float32, of x's shape and dtype.

    Raises:
      UserError: a number of channels that we know no Hadamard matrix of.
    """
    signs, parts = _matrices(x.shape[axis])
    y = jnp.moveaxis(x.astype(jnp.float32), axis, -1) * _beside(signs, x)
    return _back(_multiplied(y, parts), x, axis)


def rotate_back(x: jax.Array, axis: int) -> jax.Array:
    """The inverse, which is the transpose."""
    signs, parts = _matrices(x.shape[axis])
    y = _multiplied(jnp.moveaxis(x.astype(jnp.float32), axis, -1), [part.T for part in parts])
    return _back(y * _beside(signs, x), x, axis)


def _beside(signs: np.ndarray, x: jax.Array) -> jax.Array:
    return jnp.asarray(signs.reshape((1,) * (x.ndim - 1) + signs.shape))


def _back(y: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def _multiplied(x: jax.Array, parts: list[np.ndarray]) -> jax.Array:
    """x times the Kronecker product of the parts over its last axis, part by part."""
    leading, highest = x.shape[:-1], jax.lax.Precision.HIGHEST
    x = x.reshape(*leading, *(len(part) for part in parts))
    for part in parts:  # each turns the first of these axes into the last
        x = jnp.tensordot(x, jnp.asarray(part), (len(leading), 0), precision=highest)
    return x.reshape(*leading, -1)


@functools.cache
def _matrices(size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The signs, float32 [size], and orthogonal matrices whose Kronecker product has that order."""
    order = next((n for n in PALEY if size % n == 0 and _is_power(size // n)), 1)
    rest = size // order
    if not _is_power(rest):
        raise UserError(
            f"a Hadamard rotation needs a width of 2^k, 12 * 2^k or 20 * 2^k, found {size}: leave "
            "+hadamard out, or leave sites of that width out of quant.hadamard."
        )
    parts = [_paley(order)] if order > 1 else []
    while rest > 1:
        part = min(rest, PART)
        parts.append(_sylvester(part))
        rest //= part
    # Always the same: what was calibrated or stored by them must be read by them.
    signs = np.random.RandomState(size).choice([-1.0, 1.0], size).astype(np.float32)
    return signs, [(part / math.sqrt(len(part))).astype(np.float32) for part in parts]


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _sylvester(order: int) -> np.ndarray:
    """H of 2n is [[H, H], [H, -H]] of n."""
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


def _paley(order: int) -> np.ndarray:
    """I + [[0, 1], [-1, Q]], Q_ij saying whether i - j is a square modulo order - 1."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
    h = np.zeros((order, order))
    h[0, 1:], h[1:, 0] = 1.0, -1.0
    h[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    return h + np.eye(order)
