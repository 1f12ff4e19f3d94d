"""What a run's figures are as one row: of a table, of JSON, of a report."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.evaluation.step import Metrics
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.models.build import attention_label
from quantizable_flax.ptq.settings import Setting, parse_setting


def result_row(
    name: str,
    config: ConfigDict,
    evaluator: Evaluator,
    settings: Iterable[Setting | str],
    seeds: int,
    info: dict,
    backend: str = "simulated",
) -> dict[str, Any]:
    """Returns one row: figures of the floating-point model and of every setting.

    Keys: name, model, attention, beside_attention, metric, fp, fp_loss, max_inf_norm, avg_kurtosis,
    steps, seconds (of training), and of each setting `w8a8`, the metric's mean over calibration
    seeds, and `w8a8_std`, the standard deviation of this sample: nan of one seed, 0 where no seed
    matters.
    Where labels are scored also `w8a8_loss` and `w8a8_loss_std`, the loss in nats, which tells
    settings apart whose accuracies are the same; where fidelity is measured `w8a8_hidden_error`,
    `w8a8_pooled_error`, `w8a8_neighbours`, and the same of `fp`.
    """
    row: dict[str, Any] = {
        "name": name,
        "model": config.model.name,
        "attention": attention_label(config),
        "beside_attention": beside_attention(config),
        "metric": evaluator.metric.name,
        "fp": evaluator.fp.value,
        "fp_loss": evaluator.fp.loss,
        "max_inf_norm": evaluator.fp.outliers["max_inf_norm"],
        "avg_kurtosis": evaluator.fp.outliers["avg_kurtosis"],
    }
    row |= _fidelity("fp", [evaluator.fp])
    for setting in map(parse_setting, settings):
        found, column = evaluator.measured(setting, seeds, backend), setting.name
        row |= _over_seeds(column, [metrics.value for metrics in found], seeds)
        if found[0].fidelity is None:
            row |= _over_seeds(f"{column}_loss", [metrics.loss for metrics in found], seeds)
        row |= _fidelity(column, found)
    row["steps"], row["seconds"] = info["step"], info["train_seconds"]
    return row


def beside_attention(config: ConfigDict) -> str:
    """What a recipe puts against outliers in norm, optimizer and loss, e.g. `RMSNorm + Muon`."""
    norms = {"rms_norm": "RMSNorm", "rms_norm_single": "RMSNorm of one scale"}
    parts = [norms.get(config.model.get("norm", ""), "")]
    parts.append("Muon" if config.optimizer.name == "muon" else "")
    parts.append("loss on large activations" if config.penalty.weight else "")
    return " + ".join(filter(None, parts))


def _over_seeds(key: str, values: Sequence[float], seeds: int) -> dict[str, float]:
    """Mean and standard deviation over so many seeds; one value of several is that of each."""
    deviation = 0.0 if seeds > 1 else math.nan
    if len(values) > 1:
        with np.errstate(invalid="ignore"):  # infinite values have no deviation: nan
            deviation = float(np.std(values, ddof=1))
    return {key: float(np.mean(values)), f"{key}_std": deviation}


def _fidelity(column: str, found: Sequence[Metrics]) -> dict[str, float]:
    """Means of what is measured beside the cosine, nothing where labels are scored."""
    known = [metrics.fidelity for metrics in found if metrics.fidelity is not None]
    names = ("hidden_error", "pooled_error", "neighbours") if known else ()
    return {f"{column}_{name}": float(np.mean([getattr(f, name) for f in known])) for name in names}
