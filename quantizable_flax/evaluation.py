"""Floating-point and INT8 evaluation: perplexity and outlier metrics, streamed over batches."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.analysis.outliers import SITES, OutlierSites, published_stats, summarise
from quantizable_flax.data import Tokenizer, eval_batches, make_transform
from quantizable_flax.errors import UserError, nearest
from quantizable_flax.models.registry import (
    attention_label,
    check_length,
    with_config,
    with_quant,
)
from quantizable_flax.quantization.calibration import calibrate, make_calibrate_step
from quantizable_flax.quantization.sites import RANGES, STATS
from quantizable_flax.quantization.spec import QuantSpec, parse_bits

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
AVERAGINGS = ("token", "published")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one pass over a split gives.

    Attributes:
      loss: nats per labelled token.
      perplexity: exp of the loss, averaged as asked.
      outliers: max_inf_norm, avg_kurtosis, max_kurtosis; empty without statistics.
      sites: mean of each published statistic, `site:statistic` -> value.
    """

    loss: float
    perplexity: float
    outliers: dict[str, float]
    sites: dict[str, float]


def make_eval_step(model: nn.Module, sites: OutlierSites | None = None) -> Callable:
    """Returns the jitted `(params, ranges, batch) -> sums`.

    Sums are device scalars: loss, labelled tokens, examples and, if `sites` is given, each
    published statistic over samples. Nothing larger than a scalar leaves the step.
    """

    def eval_step(params, ranges, batch):
        mutable = [STATS] if sites is not None else []
        (loss_B, labels_B), updated = model.apply(
            {"params": params, RANGES: ranges}, batch, method="loss", mutable=mutable
        )
        weight_B = batch.get("example_weight", jnp.ones_like(loss_B))
        sums: dict[str, Any] = {
            "loss": jnp.sum(loss_B * weight_B),
            "labels": jnp.sum(labels_B * weight_B),
            "examples": jnp.sum(weight_B),
        }
        if sites is not None:
            stats = published_stats(updated[STATS], sites)
            sums["stats"] = {name: jnp.sum(x_B * weight_B) for name, x_B in stats.items()}
        return sums

    return jax.jit(eval_step)


def evaluate(
    step: Callable,
    params: Any,
    batches: Iterable[Batch],
    ranges: Any = None,
    *,
    averaging: str = "token",
    kurtosis_batches: int = 0,
) -> Metrics:
    """Streams the batches through `make_eval_step`'s step and averages in float64.

    Args:
      step: from `make_eval_step`.
      params: of the model.
      batches: what `model.loss` takes; `example_weight` 0 marks padding examples.
      ranges: calibrated ranges of a quantized model.
      averaging: "token" weighs every labelled token alike; "published" averages the batches' mean
        losses weighted by batch size, as the original does.
      kurtosis_batches: take the kurtosis over the first n batches only (the original: 257 for
        BERT); 0 for all.

    Raises:
      UserError: no batch, no labelled token, or an unknown averaging.
    """
    if averaging not in AVERAGINGS:
        raise UserError(
            f"eval.perplexity must be one of {', '.join(AVERAGINGS)}, found {averaging!r}"
            f"{nearest(averaging, AVERAGINGS)}."
        )
    sums, running = [], None
    for batch in batches:
        following = step(params, ranges or {}, {k: jnp.asarray(v) for k, v in batch.items()})
        if running is not None:
            sums.append(jax.device_get(running))  # one step late, so the device never waits
        running = following
    if running is not None:
        sums.append(jax.device_get(running))
    loss = _mean_loss(sums, averaging)
    means = _mean_stats(sums, kurtosis_batches or len(sums))
    perplexity = math.inf if loss > 700 else math.exp(loss)  # exp(nan) is nan
    return Metrics(loss, perplexity, summarise(means) if means else {}, means)


def _mean_loss(sums: list[dict[str, Any]], averaging: str) -> float:
    loss, labels, examples = (
        np.array([part[key] for part in sums], np.float64) for key in ("loss", "labels", "examples")
    )
    if labels.sum() == 0:
        raise UserError(
            "evaluation needs at least one batch with a labelled token, found none: give it more "
            "data or a higher data.mask_rate."
        )
    if averaging == "published":
        return float(np.sum(examples * loss / np.maximum(labels, 1.0)) / examples.sum())
    return float(loss.sum() / labels.sum())


def _mean_stats(sums: list[dict[str, Any]], kurtosis_batches: int) -> dict[str, float]:
    means = {}
    for name in sums[0].get("stats", {}):
        seen = sums[:kurtosis_batches] if name.endswith(":kurtosis") else sums
        examples = math.fsum(part["examples"] for part in seen)
        means[name] = math.fsum(part["stats"][name] for part in seen) / examples
    return means


class Evaluator:
    """All figures of one trained model: floating point once, then any number of quantized setups.

    Everything is computed in float32, whatever dtype the run was trained in: on a grid the rounding
    of bfloat16 would be measured along with that of INT8.

    Attributes:
      config: of the run, with the data to evaluate on.
      fp: the floating-point metrics, with outliers.
    """

    def __init__(self, config: ConfigDict, model: nn.Module, params: Any, tokenizer: Tokenizer):
        check_length(config)
        self.config, self._params = config, params
        self._model = with_config(model, dtype=jnp.float32)
        self._tokenizer, self._transform = tokenizer, make_transform(config, tokenizer)
        self._batches = eval_batches(
            config,
            tokenizer,
            self._transform,
            batch_size=config.eval.batch_size,
            num_batches=config.eval.batches or None,
        )
        logger.info("evaluating in floating point")
        self.fp = self._evaluate(self._model, SITES[config.model.name])

    def quantized(self, bits: str, seeds: int) -> list[float]:
        """Perplexities of one bit setting such as `w8a8`, one per calibration seed 0..seeds-1."""
        model = with_quant(self._model, make_spec(self.config, bits))
        calibrate_step, eval_step = make_calibrate_step(model), make_eval_step(model)
        perplexities = []
        for seed in range(seeds):
            logger.info("evaluating %s, calibration seed %d of %d", bits, seed + 1, seeds)
            ranges = calibrate(
                model, self._params, self._calibration_batches(seed), step=calibrate_step
            )
            perplexities.append(self._evaluate(model, None, ranges, eval_step).perplexity)
        return perplexities

    def _calibration_batches(self, seed: int) -> Iterable[Batch]:
        quant = self.config.quant
        if quant.calibration_batches < 1:
            raise UserError(
                "quant.calibration_batches must be at least 1, found "
                f"{quant.calibration_batches}: static ranges need data."
            )
        try:
            return eval_batches(
                self.config,
                self._tokenizer,
                self._transform,
                split="train",
                batch_size=quant.calibration_batch_size,
                num_batches=quant.calibration_batches,
                seed=seed,
                full=True,
            )
        except UserError as error:
            raise UserError(
                f"quant.calibration_batches * quant.calibration_batch_size: {error}"
            ) from error

    def _evaluate(self, model, sites, ranges=None, step=None) -> Metrics:
        return evaluate(
            step or make_eval_step(model, sites),
            self._params,
            self._batches,
            ranges,
            averaging=self.config.eval.perplexity,
            kurtosis_batches=self.config.eval.kurtosis_batches,
        )


def make_spec(config: ConfigDict, bits: str) -> QuantSpec:
    """Returns the scheme of `config.quant` with bit widths such as `w8a8`.

    Raises:
      UserError: unreadable or impossible bit widths, or a bad key of `config.quant`.
    """
    quant, (weight_bits, activation_bits) = config.quant, parse_bits(bits)
    return QuantSpec(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_estimator=quant.weight_estimator,
        weight_per_channel=quant.weight_per_channel,
        activation_symmetric=quant.activation_symmetric,
        momentum=quant.momentum,
        percentile=quant.percentile,
    )


def result_row(
    name: str, config: ConfigDict, evaluator: Evaluator, bits: Iterable[str], seeds: int, info: dict
) -> dict[str, Any]:
    """Returns one table row: figures of the floating-point model and of every bit setting.

    Keys: name, model, attention, metric, fp, max_inf_norm, avg_kurtosis, steps, seconds (of
    training), and per setting `w8a8` (mean over calibration seeds) and `w8a8_std`.
    """
    row: dict[str, Any] = {
        "name": name,
        "model": config.model.name,
        "attention": attention_label(config),
        "metric": "perplexity",
        "fp": evaluator.fp.perplexity,
        "max_inf_norm": evaluator.fp.outliers["max_inf_norm"],
        "avg_kurtosis": evaluator.fp.outliers["avg_kurtosis"],
    }
    for setting in bits:
        values = evaluator.quantized(setting, seeds)
        row[setting], row[f"{setting}_std"] = float(np.mean(values)), float(np.std(values))
    row["steps"], row["seconds"] = info["step"], info["train_seconds"]
    return row
