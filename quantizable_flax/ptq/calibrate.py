"""Calibration: batches in, the `ranges` collection out; and what keeps it true in training."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.quantization.sites import FRESH, GRIDS, RANGES, SWITCHES

Batch = dict[str, Any]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def calibrate_step(model: nn.Module, params: Any, ranges: Any, batch: Batch, switches: Any) -> Any:
    """Returns the ranges after one more batch; `switches` as in `calibrate`, {} for none."""
    _, updated = model.apply(
        {"params": params, RANGES: ranges, SWITCHES: switches},
        batch,
        method="loss",
        mutable=[RANGES],
    )
    return updated.get(RANGES, {})  # empty where each row has a range of its own


def calibrate(
    model: nn.Module, params: Any, batches: Iterable[Batch], *, switches: Any = None
) -> Any:
    """Runs the calibration batches in order and returns the ranges of all sites.

    Quantization is on from the first batch with the ranges known so far, so later sites see
    quantized inputs (arXiv 2306.12929, section 5). A model is compiled once, however often it is
    calibrated.

    Args:
      model: a model with a quant spec, of this package or your own; see `with_quant`.
      params: its parameters.
      batches: what `model.loss` takes; all of one shape.
      switches: the collection `SWITCHES`; a site that is off passes its input on as it is.

    Raises:
      UserError: no batch at all, or a value that is not finite.
    """
    ranges = None
    for batch in batches:
        if ranges is None:
            # By a program, so that they lie where those after a batch will: on other devices, or
            # free to be moved, they would have the step compiled twice.
            example = None if hasattr(model, "example_batch") else batch
            ranges = _first_ranges(model, params, example)
        ranges = calibrate_step(model, params, ranges, batch, switches or {})
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


def first_ranges(model: nn.Module, params: Any, batch: Batch | None = None) -> Any:
    """Returns the ranges before any batch: those of the weights, and unknown ones of activations.

    Traceable; `batch` gives the shapes, by default those of the model's smallest one. Inside
    `jax.jit` nothing but the weights is computed.
    """
    batch = model.example_batch() if batch is None else batch
    _, updated = model.apply({"params": params}, batch, method="loss", mutable=[RANGES, FRESH])
    unknown = jax.tree.map(jnp.zeros_like, updated.get(RANGES, {}))
    return _with_fresh(unknown, updated)


_first_ranges = jax.jit(first_ranges, static_argnums=0)


def with_weight_ranges(model: nn.Module, params: Any, ranges: Any) -> Any:
    """Returns the ranges with those of all weights taken anew; activations keep theirs.

    Traceable; the forward pass around the weights is of the smallest batch, and inside `jax.jit`
    it is left out of the program, as nothing reads it.
    """
    _, updated = model.apply(
        {"params": params, RANGES: ranges}, model.example_batch(), method="loss", mutable=[FRESH]
    )
    return _with_fresh(ranges, updated)


def _with_fresh(ranges: Any, updated: Any) -> Any:
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
