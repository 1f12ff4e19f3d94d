"""Quantization-aware training: ranges before the first step, see `ptq/trained.py`."""

import dataclasses
import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.data.calibration_batches import calibration_batches
from quantizable_flax.data.task import Task
from quantizable_flax.ptq.calibrate import calibrate, with_grids
from quantizable_flax.ptq.trained import learns_ranges
from quantizable_flax.quantization.learned import without_grids


def calibrated(config: ConfigDict, model: nn.Module, task: Task, state: TrainState) -> TrainState:
    """Returns the state before the first step with its ranges calibrated on training data.

    Raises:
      UserError: too few data for `quant.calibration_batches`.
    """
    params = without_grids(state.params)
    # Every device computes whole batches: any number of examples is divided so.
    ranges = calibrate(model, params, calibration_batches(config, task, seed=config.seed))
    if learns_ranges(config):
        params = jax.jit(functools.partial(with_grids, model))(params, ranges)
        known = dataclasses.replace(state, params=params)
    else:
        known = dataclasses.replace(state, ranges=ranges)
    return jax.device_put(known, jax.tree.map(lambda x: x.sharding, state))
