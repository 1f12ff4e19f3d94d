"""Simulated quantization: our grid, AQT's tensors and numerics; only this file imports aqt."""

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_tensor, utils
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


def quantize(x: jax.Array, grid: Grid) -> jax.Array:
    """Returns the codes of x on the grid, float32 holding integers in [lower, upper]."""
    codes, _ = AffineNumerics(grid=grid).vjp_fwd(x.astype(jnp.float32) / grid.scale, None)
    return codes


def dequantize(codes: jax.Array, grid: Grid, dtype: jnp.dtype) -> jax.Array:
    """Returns `scale * (codes - zero_point)` through AQT's QTensor, cast to dtype."""
    tensor = aqt_tensor.QTensor(
        qvalue=codes - grid.zero_point,
        scale=[grid.scale],
        scale_t=None,
        bias=[],
        dequant_dtype=jnp.float32,
    )
    return rounded(tensor.dequant()).astype(dtype)


@jax.custom_vjp
def fake_quantize(x: jax.Array, grid: Grid) -> jax.Array:
    """Rounds x to the grid and back, in x's shape and dtype.

    The gradient is straight-through: 1 where the code lies on the grid, 0 where it was clipped;
    the grid itself receives none.
    """
    return dequantize(quantize(x, grid), grid, x.dtype)


def _forward(x, grid):
    codes, passes = AffineNumerics(grid=grid).vjp_fwd(x.astype(jnp.float32) / grid.scale, None)
    return dequantize(codes, grid, x.dtype), (passes, grid)


def _backward(res, cotangent):
    passes, grid = res
    grad_x, _ = AffineNumerics(grid=grid).vjp_bwd(passes, cotangent)
    return grad_x, jax.tree.map(jnp.zeros_like, grid)


fake_quantize.defvjp(_forward, _backward)
