"""Post-training calibration: batches in, the `ranges` collection out."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.quantization.sites import RANGES

Batch = dict[str, Any]


def make_calibrate_step(model: nn.Module) -> Callable:
    """Returns the jitted `(params, ranges, batch) -> ranges` of a model with a quant spec."""

    @functools.partial(jax.jit, donate_argnums=1)
    def calibrate_step(params, ranges, batch):
        _, updated = model.apply(
            {"params": params, RANGES: ranges}, batch, method="loss", mutable=[RANGES]
        )
        return updated[RANGES]

    return calibrate_step


def calibrate(
    model: nn.Module, params: Any, batches: Iterable[Batch], *, step: Callable | None = None
) -> Any:
    """Runs the calibration batches in order and returns the ranges of all sites.

    Quantization is on from the first batch with the ranges known so far, so later sites see
    quantized inputs (arXiv 2306.12929, section 5).

    Args:
      model: a model whose config carries a quant spec.
      params: its parameters.
      batches: what `model.loss` takes; all of one shape.
      step: a compiled `make_calibrate_step(model)` to use again, None makes one.

    Raises:
      UserError: no batch at all.
    """
    step, ranges = step or make_calibrate_step(model), None
    for batch in batches:
        if ranges is None:
            ranges = unknown_ranges(model, params, batch)
        ranges = step(params, ranges, batch)
    if ranges is None:
        raise UserError(
            "calibration needs at least one batch, found none: give it data, or raise "
            "quant.calibration_batches."
        )
    return ranges


def unknown_ranges(model: nn.Module, params: Any, batch: Batch) -> Any:
    """Returns the ranges collection before any batch: zeros, count 0 at every site."""

    def forward(params, batch):
        _, updated = model.apply({"params": params}, batch, method="loss", mutable=[RANGES])
        return updated[RANGES]

    shapes = jax.eval_shape(forward, params, batch)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
