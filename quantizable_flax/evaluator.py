"""All figures of a trained run: floating point, and post-training quantization in any setting."""

import logging
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.analysis.outliers import outlier_sites
from quantizable_flax.data import Task, eval_batches
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation import Metrics, evaluate, make_eval_step
from quantizable_flax.models.registry import (
    attention_label,
    check_length,
    with_config,
    with_quant,
)
from quantizable_flax.quantization.calibration import calibrate, make_calibrate_step
from quantizable_flax.quantization.spec import QuantSpec, parse_bits, parse_setup

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Evaluator:
    """All figures of one trained model: floating point once, then any number of quantized setups.

    Everything is computed in float32, whatever dtype the run was trained in: on a grid the rounding
    of bfloat16 would be measured along with that of INT8.

    Attributes:
      config: of the run, with the data to evaluate on.
      metric: the model's, e.g. perplexity.
      fp: the floating-point metrics, with outliers.
    """

    def __init__(self, config: ConfigDict, model: nn.Module, params: Any, task: Task):
        check_length(config)
        self.config, self._params, self._task = config, params, task
        self._model = with_config(model, dtype=jnp.float32)
        self.metric = model.metric
        self._batches = eval_batches(
            task,
            batch_size=config.eval.batch_size,
            num_batches=config.eval.batches or None,
            workers=config.data.workers,
        )
        logger.info("evaluating in floating point")
        self.fp = self._evaluate(self._model, outlier_sites(config), label="floating point")

    def quantized(self, bits: str, seeds: int) -> list[float]:
        """The metric in one bit setting such as `w8a8`, one per calibration seed 0..seeds-1."""
        model = with_quant(self._model, make_spec(self.config, bits))
        calibrate_step, eval_step = make_calibrate_step(model), make_eval_step(model)
        values = []
        for seed in range(seeds):
            logger.info("evaluating %s, calibration seed %d of %d", bits, seed + 1, seeds)
            ranges = calibrate(
                model, self._params, self._calibration_batches(seed), step=calibrate_step
            )
            metrics = self._evaluate(model, None, ranges, eval_step, label=bits)
            values.append(metrics.value)
        return values

    def _calibration_batches(self, seed: int) -> Iterable[Batch]:
        quant = self.config.quant
        if quant.calibration_batches < 1:
            raise UserError(
                "quant.calibration_batches must be at least 1, found "
                f"{quant.calibration_batches}: static ranges need data."
            )
        try:
            return eval_batches(
                self._task,
                split="train",
                batch_size=quant.calibration_batch_size,
                num_batches=quant.calibration_batches,
                seed=seed,
                full=True,
                workers=self.config.data.workers,
            )
        except UserError as error:
            raise UserError(
                f"quant.calibration_batches * quant.calibration_batch_size: {error}"
            ) from error

    def _evaluate(self, model, sites, ranges=None, step=None, *, label: str) -> Metrics:
        return evaluate(
            step or make_eval_step(model, sites),
            self._params,
            self._batches,
            ranges,
            metric=self.metric,
            label=label,
            averaging=self.config.eval.perplexity,
            kurtosis_batches=self.config.eval.kurtosis_batches,
        )


def make_spec(config: ConfigDict, bits: str) -> QuantSpec:
    """Returns the scheme of `config.quant` with bit widths such as `w8a8`.

    Raises:
      UserError: unreadable or impossible bit widths or setup, or a bad key of `config.quant`.
    """
    quant, (weight_bits, activation_bits) = config.quant, parse_bits(bits)
    return QuantSpec(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_estimator=quant.weight_estimator,
        weight_percentile=quant.weight_percentile,
        weight_per_channel=quant.weight_per_channel,
        activation_estimator=quant.activation_estimator,
        activation_symmetric=quant.activation_symmetric,
        momentum=quant.momentum,
        percentile=quant.percentile,
        gated_context=quant.gated_context,
        **parse_setup(quant.setup),
    )


def result_row(
    name: str, config: ConfigDict, evaluator: Evaluator, bits: Iterable[str], seeds: int, info: dict
) -> dict[str, Any]:
    """Returns one table row: figures of the floating-point model and of every bit setting.

    Keys: name, model, attention, metric, fp, fp_loss, max_inf_norm, avg_kurtosis, steps, seconds
    (of training), and per setting `w8a8` (mean over calibration seeds) and `w8a8_std`.
    """
    row: dict[str, Any] = {
        "name": name,
        "model": config.model.name,
        "attention": attention_label(config),
        "metric": evaluator.metric.name,
        "fp": evaluator.fp.value,
        "fp_loss": evaluator.fp.loss,
        "max_inf_norm": evaluator.fp.outliers["max_inf_norm"],
        "avg_kurtosis": evaluator.fp.outliers["avg_kurtosis"],
    }
    for setting in bits:
        values = evaluator.quantized(setting, seeds)
        row[setting], row[f"{setting}_std"] = float(np.mean(values)), float(np.std(values))
    row["steps"], row["seconds"] = info["step"], info["train_seconds"]
    return row
