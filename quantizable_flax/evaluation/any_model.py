"""The row of results of a model that no run and no configuration stands behind: `evaluate`."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.outliers import published_stats
from quantizable_flax.evaluation.step import Batch, make_eval_step
from quantizable_flax.evaluation.step import evaluate as evaluate_step
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.losses import Scores
from quantizable_flax.models.metric import METRICS
from quantizable_flax.models.structure import OutlierSites
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.settings import Setting, check_patterns, make_spec, parse_setting
from quantizable_flax.ptq.smoothquant import smooth
from quantizable_flax.quantization.sites import STATS

OF_LABELS = ("perplexity", "top1")


def evaluate(
    model: nn.Module,
    params: Any,
    batches: Iterable[Batch],
    *,
    calibration_batches: Iterable[Batch],
    outliers: str,
    settings: Sequence[str] = ("w8a8",),
    metric: str = "perplexity",
) -> dict[str, float]:
    """Evaluates any Linen model: floating point, outliers and post-training quantization.

    Args:
      model: with a field `quant: QuantSpec | None`, which it hands to its `Site`s, `Dense` and
        `MultiHeadAttention`, and a method `loss(batch)` that returns what `token_scores` does.
      params: its parameters.
      batches: dictionaries of arrays as `loss` takes, [B, ...], all of one shape; run through once
        per column, so a list or what begins anew. `example_weight`, [B], is 0 for padding.
      calibration_batches: the same, of the training data.
      outliers: a regular expression; the `Site`s whose full path it matches are those that
        infinity norm and kurtosis are taken over, as `block_0/residual`.
      settings: columns as of `eval.py --quant`, e.g. `w8a8`, `w4a8+mse+channel`.
      metric: "perplexity" or "top1", in per cent.

    Returns:
      `fp` (the metric in floating point), `fp_loss`, `max_inf_norm`, `avg_kurtosis`, and the metric
      in each setting under its name.

    Raises:
      UserError: batches that can be run through only once or are none, an expression that matches
        no site, an unknown setting or metric, a model without `loss` or `quant`.
    """
    check_choice("metric", metric, OF_LABELS)
    columns = [parse_setting(name) for name in settings]
    _check_batches("batches", batches)
    _check_batches("calibration_batches", calibration_batches)
    params = nn.unbox(params)
    floating, sites = with_quant(model, None), OutlierSites(outliers, outliers)
    _check_model(floating, params, next(iter(batches)), sites)

    def run(model: nn.Module, params: Any, ranges: Any, sites: OutlierSites | None = None):
        step = make_eval_step(model, sites)
        return evaluate_step(step, params, batches, ranges, metric=METRICS[metric], label=None)

    found = run(floating, params, {}, sites)
    row = {"fp": found.value, "fp_loss": found.loss}
    row |= {name: found.outliers[name] for name in ("max_inf_norm", "avg_kurtosis")}
    for setting in columns:
        row[setting.name] = run(*_quantized(model, params, calibration_batches, setting)).value
    return row


def _quantized(
    model: nn.Module, params: Any, batches: Iterable[Batch], setting: Setting
) -> tuple[nn.Module, Any, Any]:
    """(model, parameters, ranges) in a setting, calibrated."""
    spec = make_spec(default_config(), setting)
    quantized = with_quant(model, spec)
    if setting.smooth is not None:
        _check_folds(model)
        params = smooth(quantized, params, batches, setting.smooth)
    ranges = calibrate(quantized, params, batches)
    if spec.hadamard is not None:
        known = traverse_util.flatten_dict(ranges)
        check_patterns("+hadamard", [spec.hadamard], ["/".join(path[:-1]) for path in known])
    return quantized, params, ranges


def _check_batches(name: str, batches: Iterable[Batch]) -> None:
    if iter(batches) is batches:
        raise UserError(
            f"{name} must be a list or what begins anew, found an iterator, which is spent after "
            "one column: give list(...) of it."
        )
    if next(iter(batches), None) is None:
        raise UserError(f"{name} must hold at least one batch, found none: give it data.")


def _check_model(model: nn.Module, params: Any, batch: Batch, sites: OutlierSites) -> None:
    """Raises UserError for a loss that cannot be averaged, or sites that are nowhere."""
    kind = type(model).__name__
    if not hasattr(model, "loss"):
        raise UserError(
            f"a model to evaluate needs a method loss(batch), found none in {kind}: return "
            "token_scores(logits, labels) from it."
        )

    def forward(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch, method="loss", mutable=[STATS])

    scores, updated = jax.eval_shape(forward, params, jax.tree.map(jnp.asarray, batch))
    if not isinstance(scores, Scores):
        raise UserError(
            f"{kind}.loss must return what token_scores does, found {type(scores).__name__}: it is "
            "averaged over labels, and so are right answers."
        )
    stats = updated.get(STATS, {})
    if not jax.eval_shape(lambda stats: published_stats(stats, sites), stats):
        paths = traverse_util.flatten_dict(stats, sep="/")
        names = sorted({path.rpartition("/")[0] for path in paths if path.endswith("/inf_norm")})
        raise UserError(
            f"outliers={sites.inf_norm!r} matches no site in full, found the sites "
            f"{', '.join(names) or '(none)'}: name some of them."
        )


def _check_folds(model: nn.Module) -> None:
    if not hasattr(model, "config"):
        raise UserError(
            "SmoothQuant needs to know which layers read a LayerNorm, found no `folds` in "
            f"{type(model).__name__}: leave +smooth out, or register a family (docs/new_model.md)."
        )
