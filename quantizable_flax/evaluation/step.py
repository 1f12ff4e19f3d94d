"""One pass over a split: loss, metric and outlier statistics, streamed over batches."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.outliers import published_stats, summarise
from quantizable_flax.models.metric import Metric
from quantizable_flax.models.structure import OutlierSites
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.quantization.sites import RANGES, STATS

Batch = dict[str, Any]
AVERAGINGS = ("token", "published")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one pass over a split gives.

    Attributes:
      loss: nats per labelled item, averaged as asked; nan where fidelity is measured instead.
      accuracy: share of the labels whose logit is above all others, in [0, 1].
      value: the model's metric, e.g. perplexity.
      outliers: max_inf_norm, avg_kurtosis, max_kurtosis; empty without statistics.
      sites: mean of each published statistic, `site:statistic` -> value.
      fidelity: to a reference, see `evaluation/fidelity.py`, None where labels are scored.
    """

    loss: float
    accuracy: float
    value: float
    outliers: dict[str, float]
    sites: dict[str, float]
    fidelity: Any = None


def make_eval_step(
    model: nn.Module, sites: OutlierSites | None = None, mesh: Mesh | None = None
) -> Callable:
    """Returns the jitted `(params, ranges, batch) -> sums`.

    Sums are device scalars: loss, labels, right ones, examples and, if `sites` is given, each
    published statistic over samples. Nothing larger than a scalar leaves the step. With a mesh,
    activations are laid out on it.
    """

    def eval_step(params, ranges, batch):
        mutable = [STATS] if sites is not None else []
        with on_mesh(mesh):
            scores, updated = model.apply(
                {"params": params, RANGES: ranges}, batch, method="loss", mutable=mutable
            )
        weight_B = batch.get("example_weight", jnp.ones_like(scores.loss))
        sums: dict[str, Any] = {
            "loss": jnp.sum(scores.loss * weight_B),
            "labels": jnp.sum(scores.weight * weight_B),
            "correct": jnp.sum(scores.correct * weight_B),
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
    metric: Metric,
    averaging: str = "token",
    label: str | None = "evaluating",
    place: Callable[[Batch], Batch] | None = None,
    kurtosis_batches: int = 0,
) -> Metrics:
    """Streams the batches through `make_eval_step`'s step and averages in float64.

    Args:
      step: from `make_eval_step`.
      params: of the model.
      batches: what `model.loss` takes; `example_weight` 0 marks padding examples.
      ranges: calibrated ranges of a quantized model.
      metric: the model's.
      averaging: "token" weighs every label alike; "published" averages the batches' mean losses
        weighted by batch size, as the original does.
      label: of the progress bar on a terminal, None for no bar.
      place: moves a batch to the devices; by default all of it to the first.
      kurtosis_batches: take the kurtosis over the first n batches only (the original: 257 for
        BERT); 0 for all.

    Raises:
      UserError: no batch, no label, or an unknown averaging.
    """
    check_choice("eval.perplexity", averaging, AVERAGINGS)
    sums = list(stream(step, params, batches, ranges, label, place))
    loss = _mean_loss(sums, averaging)
    accuracy = math.fsum(part["correct"] for part in sums) / math.fsum(
        part["labels"] for part in sums
    )
    means = mean_stats(sums, kurtosis_batches or len(sums))
    return Metrics(
        loss, accuracy, metric.value(loss, accuracy), summarise(means) if means else {}, means
    )


def stream(
    step: Callable,
    params: Any,
    batches: Iterable[Batch],
    ranges: Any,
    label: str | None,
    place: Callable[[Batch], Batch] | None,
) -> Iterator[dict[str, Any]]:
    """Yields what the step gives of each batch, on the host; arguments as in `evaluate`."""
    running = None
    for batch in batches if label is None else _with_bar(batches, label):
        placed = place(batch) if place else {k: jnp.asarray(v) for k, v in batch.items()}
        following = step(params, ranges or {}, placed)
        if running is not None:
            yield jax.device_get(running)  # one step late, so the device never waits
        running = following
    if running is not None:
        yield jax.device_get(running)


def _with_bar(batches: Iterable[Batch], label: str) -> Iterable[Batch]:
    from tqdm import tqdm  # of the extra `train`: who looks at no bar needs none

    hidden = None if jax.process_index() == 0 else True  # None: shown on a terminal
    return tqdm(batches, desc=label, unit="batch", leave=False, disable=hidden)


def _mean_loss(sums: list[dict[str, Any]], averaging: str) -> float:
    loss, labels, examples = (
        np.array([part[key] for part in sums], np.float64) for key in ("loss", "labels", "examples")
    )
    if labels.sum() == 0:
        raise UserError(
            "evaluation needs at least one batch with a label, found none: give it more "
            "data or a higher data.mask_rate."
        )
    if averaging == "published":
        return float(np.sum(examples * loss / np.maximum(labels, 1.0)) / examples.sum())
    return float(loss.sum() / labels.sum())


def mean_stats(sums: list[dict[str, Any]], kurtosis_batches: int) -> dict[str, float]:
    """Means over examples of the statistics that a step summed, the kurtosis over some batches."""
    means = {}
    for name in sums[0].get("stats", {}):
        seen = sums[:kurtosis_batches] if name.endswith(":kurtosis") else sums
        examples = math.fsum(part["examples"] for part in seen)
        means[name] = math.fsum(part["stats"][name] for part in seen) / examples
    return means
