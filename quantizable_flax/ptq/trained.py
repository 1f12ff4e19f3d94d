"""The model that a run trains: in floating point, or on the grids of `config.quant`.

Gradients pass the rounding straight through (Bengio et al., arXiv 1308.3432). `quant.train_ranges`:

  running: as in calibration, with every training batch, and used at once. Weights take theirs
    anew in every step; with `quant.weight_estimator=mse` that is a hundred passes over each.
  learned: calibration gives the first grids, and scales and zero points are parameters from then
    on, see `quantization/learned.py`.
"""

import flax.linen as nn
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.models.build import build_model, with_quant
from quantizable_flax.ptq.settings import check_spec, make_spec
from quantizable_flax.quantization.spec import QuantSpec

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
    return make_spec(config, quant.train_setting)


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
