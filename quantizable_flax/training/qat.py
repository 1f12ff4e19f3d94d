"""Quantization-aware training: the model on its grids, from the first step on.

Gradients pass the rounding straight through (Bengio et al., arXiv 1308.3432). `quant.train_ranges`:

  running: as in calibration, with every training batch, and used at once. Weights take theirs
    anew in every step; with `quant.weight_estimator=mse` that is a hundred passes over each.
  learned: calibration gives the first grids, and scales and zero points are parameters from then
    on, see `quantization/learned.py`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from quantizable_flax.data import Task, calibration_batches
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.models.registry import build_model, with_quant
from quantizable_flax.ptq.settings import check_spec, make_spec
from quantizable_flax.quantization.calibration import calibrate, with_grids
from quantizable_flax.quantization.learned import without_grids
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.training.step import TrainState

TRAIN_RANGES = ("running", "learned")


def learns_ranges(config: ConfigDict) -> bool:
    """Whether the grids are parameters."""
    return config.quant.train and config.quant.train_ranges == "learned"


def trained_spec(config: ConfigDict) -> QuantSpec | None:
    """Returns the scheme that `config.quant` trains, None for training in floating point.

    Raises:
      UserError: as `make_spec`, or ranges that cannot be trained.
    """
    quant = config.quant
    if not quant.train:
        return None
    check_choice("quant.train_ranges", quant.train_ranges, TRAIN_RANGES)
    if quant.range_learning_rate is not None and quant.train_ranges != "learned":
        raise UserError(
            "quant.range_learning_rate is of quant.train_ranges=learned, found "
            f"{quant.train_ranges}: leave it out."
        )
    if quant.train_ranges == "running" and quant.activation_estimator != "minmax":
        raise UserError(
            "quant.train_ranges=running needs quant.activation_estimator=minmax, found "
            f"{quant.activation_estimator}: a search in every step would cost many of its passes."
        )
    return make_spec(config, quant.bits)


def model_to_train(config: ConfigDict) -> nn.Module:
    """Returns the model of a run, with fake quantization if `config.quant.train`.

    Raises:
      UserError: as `build_model` and `trained_spec`.
    """
    model, spec = build_model(config), trained_spec(config)
    if spec is not None:
        check_spec(model, spec)
    return with_quant(model, spec)


def trained_model(config: ConfigDict) -> nn.Module:
    """Returns the model that a run's parameters are of: quantized if they hold its grids."""
    return model_to_train(config) if learns_ranges(config) else build_model(config)


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
