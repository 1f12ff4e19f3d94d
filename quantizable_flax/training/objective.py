"""What a step minimises: the loss on labels, or the distance to a teacher and large activations."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.quantization.sites import RANGES

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

    Sums are divided once, so a token weighs the same in whatever micro-batch it lies.
    """

    given: tuple[Any, ...] = ()

    def __init__(self, model: nn.Module):
        self._model = model

    @property
    def zeros(self) -> tuple[jax.Array, jax.Array]:
        """Labels, and right answers."""
        return jnp.float32(0.0), jnp.float32(0.0)

    def loss(self, batch: Batch, parts: int, *given: Any) -> LossFn:
        """As `Objective`: nats, summed over labels."""
        del batch, parts, given

        def loss_fn(params, ranges, batch, key):
            scores, ranges, _ = forward(self._model, params, ranges, batch, key, method="loss")
            counts = jnp.sum(scores.weight), jnp.sum(scores.correct)
            return scores.total, (counts, ranges)

        return loss_fn

    def finish(self, loss: jax.Array, sums: Any) -> tuple[Any, Metrics]:
        """As `Objective`."""
        labels, correct = sums
        scale = 1.0 / jnp.maximum(labels, 1.0)
        return scale, {"loss": loss * scale, "accuracy": correct * scale, "labels": labels}


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
