"""Calibration: batches in, the `ranges` collection out; and what keeps it true in training."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.quantization.sites import FRESH, GRIDS, RANGES, SWITCHES

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


def with_weight_ranges(model: nn.Module, params: Any, ranges: Any) -> Any:
    """Returns the ranges with those of all weights taken anew; activations keep theirs.

    Traceable; the forward pass around the weights is of the smallest batch, and inside `jax.jit`
    it is left out of the program, as nothing reads it.
    """
    _, updated = model.apply(
        {"params": params, RANGES: ranges}, model.example_batch(), method="loss", mutable=[FRESH]
    )
    fresh = traverse_util.flatten_dict(updated.get(FRESH, {}))
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(ranges) | fresh)


def with_grids(model: nn.Module, params: Any, ranges: Any) -> Any:
    """Returns the parameters with a learnable grid at every site that has a range.

    Traceable; takes parameters that are boxed with their logical axes too.
    """
    _, updated = model.apply(
        {"params": nn.meta.unbox(params), RANGES: ranges},
        model.example_batch(),
        method="loss",
        mutable=[GRIDS],
    )
    grids = traverse_util.flatten_dict(updated.get(GRIDS, {}))
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | grids)
