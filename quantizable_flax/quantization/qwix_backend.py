"""The same through qwix, AQT's successor; only this file imports qwix."""

import jax
import jax.numpy as jnp
import qwix

# qwix.quantize takes its scale from the tensor, with a bound of 127.5 for 8 bits, and adds the
# zero point before it rounds, which flips ties where that is odd. Of it we keep the rounding
# alone, which has no public name.
from qwix._src.core import numerics

from quantizable_flax.quantization.grid import centred


def round_half_to_even(steps: jax.Array) -> jax.Array:
    """Rounds float32 to integers in float32: at 16 bits codes would not fit a type of qwix's."""
    # qwix clips by the integer type that it rounds into: int32 holds far more than any grid.
    codes = numerics.convert_to(steps, jnp.int32).astype(steps.dtype)
    return jnp.where(jnp.isnan(steps), steps, codes)  # no integer says NaN


def dequantize(codes: jax.Array, zero_point: jax.Array | None, scale: jax.Array) -> jax.Array:
    """Returns `scale * (codes - zero_point)` in float32: of int8 codes through qwix's QArray."""
    # A QArray holds one byte a code; those of a simulation are floats, for gradients pass them.
    if codes.dtype != jnp.int8:
        return centred(codes, zero_point) * scale
    if zero_point is not None:
        zero_point = _beside(zero_point, codes).astype(codes.dtype)
    return qwix.dequantize(qwix.QArray(codes, _beside(scale, codes), zero_point))


def integer_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of two int8 arrays, accumulated in int32: qwix's dot_general of their codes."""
    # Not of QArrays: qwix multiplies their sums by the scales in float32, which does not hold all
    # of int32, and refuses two operands that both have zero points. Nor qwix.einsum: it multiplies
    # y by x and transposes, which XLA:CPU does in s32, a layer's product 70 times slower.
    return jnp.einsum(
        equation, x, y, preferred_element_type=jnp.int32, _dot_general=qwix.dot_general
    )


def _beside(grid: jax.Array, codes: jax.Array) -> jax.Array:
    """A scale or zero point in the rank of the codes, as a QArray wants it."""
    return jax.lax.expand_dims(jnp.asarray(grid), range(codes.ndim - jnp.ndim(grid)))
