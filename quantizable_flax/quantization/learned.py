"""Grids whose scale and zero point are parameters, beside the site that rounds to them.

As in LSQ+ (arXiv 2004.09576): autodiff with straight-through rounding gives d out / d scale =
(q - z) - x / scale where x lies on the grid and (bound - z) where it was clipped; d out / d zero
= 0 and -scale.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from quantizable_flax.quantization.grid import MIN_MAX, Grid, make_grid, symmetric_bounds
from quantizable_flax.quantization.libraries import AQT, affine_codes

GRID = "grid"  # name of a site's parameters


def begin(x_min: jax.Array, x_max: jax.Array, bits: int, *, symmetric: bool) -> dict[str, Any]:
    """Returns the parameters of the grid that a calibrated range gives.

    Asymmetric: `scale` and `zero`, in codes and not rounded; symmetric: `scale` and `signed`, 1 or
    0, which gets no gradient: whether any value was negative in calibration is kept for good.
    All are float32 of the shape of the range.
    """
    grid = make_grid(x_min, x_max, bits, symmetric=symmetric)
    if symmetric:
        return {"scale": grid.scale, "signed": jnp.asarray(grid.lower < 0.0, jnp.float32)}
    low = jnp.minimum(x_min.astype(jnp.float32), 0.0)
    # Of the unfloored step, as grid.py has it; the clip keeps the rounded value.
    step = (jnp.maximum(x_max.astype(jnp.float32), MIN_MAX) - low) / grid.upper
    return {"scale": grid.scale, "zero": jnp.clip(-low / step, 0.0, grid.upper)}


def learned_grid(
    parameters: Mapping[str, jax.Array], bits: int, *, symmetric: bool, library: str = AQT
) -> Grid:
    """Returns the grid of such parameters, differentiable towards `scale` and `zero`.

    A scale below the floor of grid.py counts as the floor, but keeps its gradient, so that it can
    come back; the zero point is `clip(round(zero), 0, 2^bits - 1)`, straight-through.
    """
    scale = parameters["scale"]
    fixed = jax.lax.stop_gradient(scale)
    scale = jnp.maximum(fixed, MIN_MAX) + (scale - fixed)
    if symmetric:
        signed = jax.lax.stop_gradient(parameters["signed"]) > 0.0
        return Grid(scale, jnp.zeros_like(fixed), *symmetric_bounds(signed, bits))
    zero, largest = parameters["zero"], 2.0**bits - 1
    codes = Grid(jnp.ones_like(zero), jnp.zeros_like(zero), 0.0, largest)
    return Grid(scale, affine_codes(zero, codes, library), 0.0, largest)


def is_grid(path: tuple[str, ...]) -> bool:
    """Whether a parameter, by the names on its way from the root, is of a learned grid."""
    return GRID in path


def without_grids(params: Any) -> Any:
    """Returns the parameters of the floating-point model alone."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({k: v for k, v in flat.items() if not is_grid(k)})
