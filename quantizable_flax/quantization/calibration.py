"""Post-training calibration: batches in, the `ranges` collection out."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.quantization.sites import RANGES, SWITCHES

Batch = dict[str, Any]


def make_calibrate_step(model: nn.Module, switches: Any = None) -> Callable:
    """Returns the jitted `(params, ranges, batch) -> ranges` of a model with a quant spec.

    With `switches`, a site that is off passes its input on as it is.
    """
    collections = {} if switches is None else {SWITCHES: switches}

    @functools.partial(jax.jit, donate_argnums=1)
    def calibrate_step(params, ranges, batch):
        _, updated = model.apply(
            {"params": params, RANGES: ranges, **collections},
            batch,
            method="loss",
            mutable=[RANGES],
        )
        return updated.get(RANGES, {})  # empty where each row has a range of its own

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
      UserError: no batch at all, or a value that is not finite.
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
    check_finite(ranges)
    return ranges


def check_finite(ranges: Any) -> None:
    """Raises UserError, naming a site, if calibration saw a value that is not finite."""
    flat = traverse_util.flatten_dict(jax.device_get(ranges), sep="/")
    # Weights first: one of them spoils all activations behind it.
    for path, known in sorted(flat.items(), key=lambda item: "weight" not in item[0]):
        if not (np.all(np.isfinite(known.min)) and np.all(np.isfinite(known.max))):
            raise UserError(
                f"calibration saw a value that is not finite at {path.removesuffix('/range')}: "
                "evaluate the checkpoint in floating point, and take one that is sound."
            )


def unknown_ranges(model: nn.Module, params: Any, batch: Batch) -> Any:
    """Returns the ranges collection before any batch: zeros, count 0 at every site."""

    def forward(params, batch):
        _, updated = model.apply({"params": params}, batch, method="loss", mutable=[RANGES])
        return updated.get(RANGES, {})

    shapes = jax.eval_shape(forward, params, batch)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
