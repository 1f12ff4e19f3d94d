"""The library that rounds and multiplies, by name: AQT, or qwix, which AQT's makers go on with.

Each has one file, of three functions that give the same bits; what follows from them is here.
"""

import functools
import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.quantization.grid import Grid

AQT = "aqt"  # the default
LIBRARIES = (AQT, "qwix")


def library_named(name: str) -> ModuleType:
    """Returns `aqt_backend` or `qwix_backend`: round_half_to_even, dequantize, integer_einsum."""
    # Imported when the first tensor is rounded: attention in floating point needs neither.
    if name == AQT:
        from quantizable_flax.quantization import aqt_backend

        return aqt_backend
    from quantizable_flax.quantization import qwix_backend

    return qwix_backend


def check_library(name: str) -> None:
    """Raises UserError for another name, or an optional library that is not installed."""
    check_choice("quant.library", name, LIBRARIES)
    if name != AQT and importlib.util.find_spec(name) is None:
        raise UserError(
            f"quant.library={name} needs the package {name}, which is not installed: "
            f"pip install 'quantizable_flax[{name}]', or set quant.library={AQT}, which gives the "
            "same numbers."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def affine_codes(steps: jax.Array, grid: Grid, library: str = AQT) -> jax.Array:
    """Rounds x / scale to the codes of the grid, float32 holding integers in [lower, upper].

    Gradients to `steps` and to the zero point are straight-through: 1 where the code lies on the
    grid, 0 where it was clipped.
    """
    return _forward(steps, grid, library)[0]


def _forward(steps, grid, library):
    # The zero point joins after the rounding: before it, an odd one would flip the ties.
    code = library_named(library).round_half_to_even(steps) + grid.zero_point
    passes = (grid.lower <= code) & (code <= grid.upper)
    return jnp.clip(code, grid.lower, grid.upper), (passes, grid)


def _backward(library, res, cotangent):
    del library
    passes, grid = res
    grad = jnp.where(passes, cotangent, 0.0)
    zeros = jax.tree.map(jnp.zeros_like, grid)
    return grad, zeros._replace(zero_point=_sum_to(grad, jnp.shape(grid.zero_point)))


affine_codes.defvjp(_forward, _backward)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums x over the axes along which an array of this shape was broadcast to it."""
    x = jnp.sum(x, tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return jnp.sum(x, axes, keepdims=True)
