"""What a step minimises: the loss on labels or the distance to a teacher, and large activations."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.losses import count_labels
from quantizable_flax.quantization.sites import RANGES
from quantizable_flax.training.penalty import Penalty

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, ranges, micro-batch, key) -> (loss, (sums for `finish`, ranges)), by parameters.
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Any]]]


class Objective(Protocol):
    """A loss over micro-batches that are summed."""

    @property
    def given(self) -> tuple[Any, ...]:
        """Arrays beside state and batch that the step takes and leaves as they are."""
        ...

    @property
    def zeros(self) -> Any:
        """What the sums begin with."""
        ...

    def loss(self, batch: Batch, parts: int, *given: Any) -> LossFn:
        """Returns the loss of one of `parts` micro-batches of a batch."""
        ...

    def finish(self, loss: jax.Array, sums: Any) -> tuple[Any, Metrics]:
        """Returns the factor on the gradient of the summed loss, and the metrics of the step."""
        ...


class Labels:
    """The model's own loss; metrics are loss (nats per label), accuracy and labels, their number.

    Sums are divided once, so a token weighs the same in whatever micro-batch it lies. With a
    penalty its cost is a metric too; it weighs beside the loss per label, which is told without it.
    """

    given: tuple[Any, ...] = ()

    def __init__(self, model: nn.Module, penalty: Penalty | None = None):
        self._model: Any = model
        self._penalty = penalty

    @property
    def zeros(self) -> Metrics:
        """As `Objective`."""
        names = ["labels", "correct", *([] if self._penalty is None else ["nats", "penalty"])]
        return {name: jnp.float32(0.0) for name in names}

    def loss(self, batch: Batch, parts: int, *given: Any) -> LossFn:
        """As `Objective`: nats, summed over labels, and as often the penalty."""
        del given
        penalty = self._penalty

        def loss_fn(params, ranges, micro, key):
            asked = None if penalty is None else penalty.asked
            scores, ranges, found = forward(
                self._model, params, ranges, micro, key, method="loss", asked=asked
            )
            sums = {"labels": jnp.sum(scores.weight), "correct": jnp.sum(scores.correct)}
            if penalty is None:
                return scores.total, (sums, ranges)
            sums |= {"nats": scores.total, "penalty": penalty.cost(found) / parts}
            # What the whole sum will be divided by; a micro-batch's own labels are but some.
            labels = count_labels(batch["labels"], causal=self._model.config.causal)
            return scores.total + penalty.weight * labels * sums["penalty"], (sums, ranges)

        return loss_fn

    def finish(self, loss: jax.Array, sums: Any) -> tuple[Any, Metrics]:
        """As `Objective`."""
        scale = 1.0 / jnp.maximum(sums["labels"], 1.0)
        metrics = {
            "loss": sums.get("nats", loss) * scale,
            "accuracy": sums["correct"] * scale,
            "labels": sums["labels"],
        }
        if "penalty" in sums:
            metrics["penalty"] = sums["penalty"]
        return scale, metrics


def forward(
    model: nn.Module,
    params: Any,
    ranges: Any,
    batch: Batch,
    key: jax.Array,
    *,
    method: Any,
    asked: dict[str, Any] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Runs a model in training: (result, ranges after the batch, what was asked for).

    Args:
      model: the one that is trained.
      params: its parameters.
      ranges: running ranges, {} where it has none.
      batch: what the method takes.
      key: of dropout.
      method: of the model.
      asked: collections that sites fill, as they are before.
    """
    variables, mutable = {"params": params, **(asked or {})}, list(asked or {})
    if ranges:
        variables[RANGES], mutable = ranges, [*mutable, RANGES]
    options: dict[str, Any] = {"mutable": mutable} if mutable else {}
    found: Any = model.apply(
        variables, batch, train=True, method=method, rngs={"dropout": key}, **options
    )
    if not mutable:
        return found, ranges, {}
    result, updated = found
    return result, updated.get(RANGES, ranges), updated
