"""What a model is judged by: the labels of the data, or its fidelity to a reference."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.data.kinds import IMAGES, TEXT_ROWS, images_have_labels, kind_of
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.fidelity import evaluate_fidelity, make_fidelity_step
from quantizable_flax.evaluation.step import Batch, Metrics, evaluate, make_eval_step
from quantizable_flax.models.metric import FIDELITY, Metric
from quantizable_flax.models.structure import OutlierSites
from quantizable_flax.runtime.mesh import put_batch, put_whole

METRICS = ("auto", "fidelity")


class Judge(Protocol):
    """How one pass over a split becomes Metrics."""

    metric: Metric

    def step(self, model: nn.Module, sites: OutlierSites | None = None) -> Callable:
        """Returns the jitted step of a model; with `sites`, their statistics too."""
        ...

    def __call__(
        self, step: Callable, params: Any, batches: Iterable[Batch], ranges: Any, *, label: str
    ) -> Metrics:
        """Streams the batches through the step of a model with these params and ranges."""
        ...


class ByLabels:
    """By the model's own metric; every device of the mesh holds the model whole."""

    def __init__(self, metric: Metric, config: ConfigDict, mesh: Mesh | None):
        self.metric, self._eval, self._mesh = metric, config.eval, mesh

    def step(self, model: nn.Module, sites: OutlierSites | None = None) -> Callable:
        """As `Judge`."""
        return make_eval_step(model, sites)

    def __call__(
        self, step: Callable, params: Any, batches: Iterable[Batch], ranges: Any, *, label: str
    ) -> Metrics:
        """As `Judge`."""
        (params, ranges), place = _placed((params, ranges), self._mesh)
        return evaluate(
            step,
            params,
            batches,
            ranges,
            metric=self.metric,
            label=label,
            place=place,
            averaging=self._eval.perplexity,
            kurtosis_batches=self._eval.kurtosis_batches,
        )


class ByFidelity:
    """By the cosine of its embeddings to a reference's, which computes in floating point."""

    metric = FIDELITY

    def __init__(self, reference: nn.Module, params: Any, config: ConfigDict, mesh: Mesh | None):
        self._reference, self._params = reference, params
        self._eval, self._mesh = config.eval, mesh

    def step(self, model: nn.Module, sites: OutlierSites | None = None) -> Callable:
        """As `Judge`.

        Raises:
          UserError: the reference has another width.
        """
        ours, theirs = (m.config.hidden_size for m in (model, self._reference))
        if ours != theirs:
            raise UserError(
                f"the reference of a fidelity must have the model's width, found {theirs} and "
                f"{ours}: set eval.reference to the model that this one came from."
            )
        return make_fidelity_step(model, self._reference, sites, self._mesh)

    def __call__(
        self, step: Callable, params: Any, batches: Iterable[Batch], ranges: Any, *, label: str
    ) -> Metrics:
        """As `Judge`."""
        ((params, known), ranges), place = _placed(((params, self._params), ranges), self._mesh)
        return evaluate_fidelity(
            step,
            (params, known),
            batches,
            ranges,
            label=label,
            place=place,
            kurtosis_batches=self._eval.kurtosis_batches,
        )


def by_fidelity(config: ConfigDict, metric: Metric) -> bool:
    """Whether a model with this metric has nothing else to be judged by, or is asked to be.

    Raises:
      UserError: `config.eval.metric` is neither "auto" nor "fidelity".
    """
    check_choice("eval.metric", config.eval.metric, METRICS)
    kind = kind_of(config)
    unlabelled = kind == TEXT_ROWS or (kind == IMAGES and not images_have_labels(config))
    return metric is FIDELITY or unlabelled or config.eval.metric == "fidelity"


def _placed(tree: Any, mesh: Mesh | None) -> tuple[Any, Callable[[Batch], Batch] | None]:
    """The arrays on every device, and what puts a batch there; as they are without a mesh."""
    if mesh is None:
        return tree, None
    return put_whole(tree, mesh), functools.partial(put_batch, mesh=mesh)
