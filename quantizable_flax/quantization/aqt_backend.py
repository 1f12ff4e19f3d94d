"""Rounding, values and integer products through AQT; only this file imports aqt."""

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, aqt_tensor
from aqt.jax.v2.numerics import int_numerics

from quantizable_flax.quantization.grid import centred

# AQT's clip drops the lowest code and its QTensor multiplies by the reciprocal of the scale; the
# published scheme keeps [-2^(b-1), 2^(b-1) - 1] and divides, and ties then round differently. So
# division and clip are ours, and AQT rounds; of `bits` it then asks only that float32 holds them.
ROUNDING = int_numerics.IntSymmetric(
    bits=16,
    preserve_zero=True,
    preserve_max_val=True,
    clip=False,
    clip_gradient=False,
    round=True,
    noise_fn=None,
)


def round_half_to_even(steps: jax.Array) -> jax.Array:
    """Rounds float32 to integers in float32: at 16 bits codes would not fit one integer type."""
    return ROUNDING.vjp_fwd(steps, None)[0]


def dequantize(codes: jax.Array, zero_point: jax.Array | None, scale: jax.Array) -> jax.Array:
    """Returns `scale * (codes - zero_point)` in float32 through AQT's QTensor."""
    # A bias of AQT's is in the tensor's unit, so the zero point leaves before.
    tensor = aqt_tensor.QTensor(
        qvalue=centred(codes, zero_point),
        scale=[scale],
        scale_t=None,
        bias=[],
        dequant_dtype=jnp.float32,
    )
    return tensor.dequant()


def integer_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of two int8 arrays, accumulated in int32: AQT's dot_general of two QTensors."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.int32, _dot_general=_integer_dot)


def _integer_dot(x, y, dimension_numbers, *_, **__) -> jax.Array:
    product = aqt_dot_general.dot_general_raw_make(None, None)
    product.dg_accumulator_dtype = jnp.int32

    def tensor(codes: jax.Array) -> aqt_tensor.QTensor:
        return aqt_tensor.QTensor(
            qvalue=codes, scale=[], scale_t=None, bias=[], dequant_dtype=jnp.int32
        )

    # AQT takes the dtype of the result from unquantized operands that nothing else reads.
    result, _ = product(
        x.astype(jnp.int32), y.astype(jnp.int32), tensor(x), tensor(y), dimension_numbers
    )
    return result
