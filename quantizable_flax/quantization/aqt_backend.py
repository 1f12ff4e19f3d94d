"""Rounding, codes and integer products through AQT; only this file imports aqt."""

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, aqt_tensor, utils
from aqt.jax.v2.numerics import numerics

from quantizable_flax.quantization.grid import Grid, rounded


@utils.flax_slots_kw_only_dataclass
class AffineNumerics(numerics.AqtNumerics):
    """AQT numerics of integers relative to a zero point.

    AQT's own IntSymmetric drops the lowest code and its QTensor multiplies by the reciprocal of
    the scale; the published scheme keeps [-2^(b-1), 2^(b-1) - 1] and divides, and ties then round
    differently. So the division is ours, and AQT gets the rounding rule and the clip as numerics.
    """

    grid: Grid

    def get_dtype(self):
        """Codes stay in float32: at 16 bits they would not fit one integer type."""
        return jnp.float32

    def get_quant_bound(self):
        """The width of the grid in steps, AQT's meaning for asymmetric scaling."""
        return self.grid.upper - self.grid.lower

    def vjp_fwd(self, x, context):
        """Rounds half to even, clips; the residual says where the gradient passes."""
        del context
        lower, upper = self.grid.lower, self.grid.upper
        # The zero point joins after the rounding: before it, an odd one would flip the ties.
        code = jnp.round(x) + self.grid.zero_point
        return jnp.clip(code, lower, upper), (lower <= code) & (code <= upper)

    def vjp_bwd(self, res, grad):
        """Straight through inside the grid, 0 where the code was clipped."""
        return jnp.where(res, grad, 0.0), None


@jax.custom_vjp
def affine_codes(steps: jax.Array, grid: Grid) -> jax.Array:
    """Rounds x / scale to the codes of the grid, float32 holding integers in [lower, upper].

    Gradients to `steps` and to the zero point are straight-through: 1 where the code lies on the
    grid, 0 where it was clipped.
    """
    codes, _ = AffineNumerics(grid=grid).vjp_fwd(steps, None)
    return codes


def _forward(steps, grid):
    codes, passes = AffineNumerics(grid=grid).vjp_fwd(steps, None)
    return codes, (passes, grid)


def _backward(res, cotangent):
    passes, grid = res
    grad, _ = AffineNumerics(grid=grid).vjp_bwd(passes, cotangent)
    zeros = jax.tree.map(jnp.zeros_like, grid)
    return grad, zeros._replace(zero_point=_sum_to(grad, jnp.shape(grid.zero_point)))


affine_codes.defvjp(_forward, _backward)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums x over the axes along which an array of this shape was broadcast to it."""
    x = jnp.sum(x, tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return jnp.sum(x, axes, keepdims=True)


def dequantize(centred: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `scale * centred` through AQT's QTensor, cast to dtype."""
    tensor = aqt_tensor.QTensor(
        qvalue=centred, scale=[scale], scale_t=None, bias=[], dequant_dtype=jnp.float32
    )
    return rounded(tensor.dequant()).astype(dtype)


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
