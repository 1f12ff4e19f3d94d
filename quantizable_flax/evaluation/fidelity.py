"""How near a model stays to a reference: for models without a head, or data without labels."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from quantizable_flax.evaluation.outliers import published_stats, summarise
from quantizable_flax.evaluation.step import Batch, Metrics, mean_stats, stream
from quantizable_flax.models.structure import OutlierSites
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.quantization.sites import RANGES, STATS
from quantizable_flax.runtime.mesh import replicated

NEIGHBOURS = 10
MOST_EXAMPLES = 4096  # among which neighbours are looked for


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What one pass over a split gives beside the mean cosine of the embeddings.

    Attributes:
      cosine: mean over examples of the cosine of an embedding to the reference's.
      pooled_error: relative error of the embeddings, `|x - r| / |r|` over all of them.
      hidden_error: the same of the last hidden states of all visible tokens.
      neighbours: share of each example's 10 nearest others by the reference's embeddings (cosine)
        that are among the 10 nearest by the model's; among the first 4096 examples.
    """

    cosine: float
    pooled_error: float
    hidden_error: float
    neighbours: float


def make_fidelity_step(
    model: nn.Module,
    reference: nn.Module,
    sites: OutlierSites | None = None,
    mesh: Mesh | None = None,
) -> Callable:
    """Returns the jitted `((params, reference's params), ranges, batch) -> sums and embeddings`.

    Args:
      model: what is judged.
      reference: in floating point; of the same width.
      sites: whose statistics are taken too, None for none.
      mesh: on which activations are laid out.
    """

    def fidelity_step(params, ranges, batch):
        mutable = [STATS] if sites is not None else []
        own, theirs = params
        with on_mesh(mesh):
            found, updated = model.apply(
                {"params": own, RANGES: ranges}, batch, method="features", mutable=mutable
            )
            known: Any = reference.apply({"params": theirs}, batch, method="features")
        weight_B = batch.get("example_weight", jnp.ones_like(found.pooled_BxD[:, 0]))
        visible_BxTx1 = (found.visible_BxT * weight_B[:, None])[..., None]
        difference_BxTxD = (found.hidden_BxTxD - known.hidden_BxTxD) * visible_BxTx1
        sums: dict[str, Any] = {
            "examples": jnp.sum(weight_B),
            "error": jnp.sum(jnp.square(difference_BxTxD)),
            "size": jnp.sum(jnp.square(known.hidden_BxTxD * visible_BxTx1)),
            "weight": weight_B,
            "pooled": found.pooled_BxD,
            "known": known.pooled_BxD,
        }
        if sites is not None:
            stats = published_stats(updated[STATS], sites)
            sums["stats"] = {name: jnp.sum(x_B * weight_B) for name, x_B in stats.items()}
        return sums

    # Every process needs the embeddings of all.
    return jax.jit(fidelity_step, out_shardings=None if mesh is None else replicated(mesh))


def evaluate_fidelity(
    step: Callable,
    params: tuple[Any, Any],
    batches: Iterable[Batch],
    ranges: Any = None,
    *,
    label: str = "evaluating",
    place: Callable[[Batch], Batch] | None = None,
    kurtosis_batches: int = 0,
) -> Metrics:
    """Streams the batches through the step; the metric is the mean cosine of the embeddings.

    Args:
      step: from `make_fidelity_step`.
      params: of the model and of the reference.
      batches: what `model.features` takes; `example_weight` 0 marks padding examples.
      ranges: calibrated ranges of a quantized model.
      label: of the progress bar on a terminal.
      place: as in `evaluate`.
      kurtosis_batches: as in `evaluate`.
    """
    sums = list(stream(step, params, batches, ranges, label, place))
    real = [part["weight"] > 0 for part in sums]
    pooled, known = (
        np.concatenate([part[key][rows] for part, rows in zip(sums, real, strict=True)])
        for key in ("pooled", "known")
    )
    error, size = (math.fsum(part[key] for part in sums) for key in ("error", "size"))
    cosines_N = np.sum(_unit(pooled) * _unit(known), axis=1)
    fidelity = Fidelity(
        cosine=float(np.mean(cosines_N)),
        pooled_error=float(np.linalg.norm(pooled - known) / np.linalg.norm(known)),
        hidden_error=math.sqrt(error / size) if size else math.nan,
        neighbours=kept_neighbours(pooled, known),
    )
    means = mean_stats(sums, kurtosis_batches or len(sums))
    outliers = summarise(means) if means else {}
    return Metrics(math.nan, math.nan, fidelity.cosine, outliers, means, fidelity)


def kept_neighbours(pooled_NxD: np.ndarray, known_NxD: np.ndarray) -> float:
    """Share of the nearest neighbours that both have; nan of a single example."""
    count = min(NEIGHBOURS, len(pooled_NxD[:MOST_EXAMPLES]) - 1)
    if count < 1:
        return math.nan
    ours, theirs = (_nearest(x[:MOST_EXAMPLES], count) for x in (pooled_NxD, known_NxD))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean(shared) / count)


def _nearest(x_NxD: np.ndarray, count: int) -> np.ndarray:
    """Of each row, the numbers of the `count` others with the largest cosine: [N, count]."""
    unit = _unit(x_NxD)
    cosine_NxN = unit @ unit.T
    np.fill_diagonal(cosine_NxN, -np.inf)
    return np.argsort(-cosine_NxN, axis=1, kind="stable")[:, :count]


def _unit(x_NxD: np.ndarray) -> np.ndarray:
    x_NxD = x_NxD.astype(np.float64)
    # A vector of zeros points nowhere: its cosine is 0.
    return x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=1, keepdims=True), 1e-30)
