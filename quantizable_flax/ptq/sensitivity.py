"""Which sites cost the most: the loss, or the fidelity, when one site alone is quantized."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from quantizable_flax.errors import UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.features import cosine
from quantizable_flax.ptq.calibrate import calibrate, unknown_ranges
from quantizable_flax.quantization.sites import RANGES, SWITCHES

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Sums = tuple[jax.Array, jax.Array]  # of the losses, and how many there are


class SiteCost(NamedTuple):
    """A site and what quantizing it alone costs.

    Attributes:
      site: its full path.
      increase: of the loss, in nats per labelled item; or what the mean cosine of the embeddings to
        those in floating point loses.
    """

    site: str
    increase: float


def sensitivity(
    model: nn.Module,
    params: Any,
    calibration: Iterable[Batch],
    batches: Iterable[Batch],
    *,
    fidelity: bool = False,
    ranges: Any = None,
) -> list[SiteCost]:
    """Returns all sites of a model with a quant spec, the dearest first.

    One program serves all sites: whether a site quantizes is an argument, a mask over the sites.
    Ranges are those of floating-point activations, for everything before a site is in floating
    point when it alone is quantized.

    Args:
      model: with a quant spec; its backend plays no part.
      params: its float parameters.
      calibration: batches of training data.
      batches: what the loss is taken over; gone through once per site.
      fidelity: judge by the embeddings, for models without a head or batches without labels.
      ranges: of the model, which spare the calibration; None to take them.

    Raises:
      UserError: no batch, or a spec that quantizes nothing.
    """
    spec = dataclasses.replace(model.config.quant, backend="simulated")
    model = with_quant(model, spec)
    sites = _quantized_sites(model, params)
    nowhere_S = np.zeros(len(sites), bool)
    if ranges is None:
        ranges = calibrate(model, params, calibration, switches=_switches(sites, nowhere_S))
    kept = [{key: jnp.asarray(value) for key, value in batch.items()} for batch in batches]
    step = make_switched_step(model, sites, fidelity=fidelity)
    known_N = [step(params, ranges, nowhere_S, batch) for batch in kept] if fidelity else []

    def sums(on_S: np.ndarray) -> list[Sums]:
        found_N = [step(params, ranges, on_S, batch) for batch in kept]
        if not fidelity:
            return found_N
        return [_lost(*each) for each in zip(found_N, known_N, kept, strict=True)]

    exact, *losses = _means(sums, [nowhere_S, *np.eye(len(sites), dtype=bool)])
    costs = [SiteCost(site, value - exact) for site, value in zip(sites, losses, strict=True)]
    return sorted(costs, key=lambda cost: -cost.increase)


def _quantized_sites(model: nn.Module, params: Any) -> list[str]:
    # With the static ranges of this very scheme, so that sites without a range are listed too.
    family: Any = model
    spec = dataclasses.replace(family.config.quant, activation_ranges="static")
    ranges = unknown_ranges(with_quant(model, spec), params, family.example_batch())
    sites = ["/".join(path[:-1]) for path in traverse_util.flatten_dict(ranges)]
    if not sites:
        raise UserError(
            "sensitivity needs quantized sites, found none: give --quant bits, and "
            "quant.float_sites that leave something."
        )
    return sites


def _means(sums: Callable[[np.ndarray], list[Sums]], masks: Sequence[np.ndarray]) -> list[float]:
    """The loss with the sites of each mask quantized."""

    def mean(parts: list[Sums]) -> float:
        total, labels = np.sum(jax.device_get(parts), axis=0)
        return float(total / labels)

    losses, running = [], sums(masks[0])
    for on_S in tqdm(masks[1:], desc="sensitivity", unit="site", leave=False, disable=None):
        following = sums(on_S)
        losses.append(mean(running))  # one site late, so the device never waits
        running = following
    return [*losses, mean(running)]


def make_switched_step(model: nn.Module, sites: Sequence[str], *, fidelity: bool = False):
    """Returns the jitted `(params, ranges, on, batch) -> (summed loss, labels)`.

    `on` is bool [sites]: which of them quantize. With `fidelity` it returns the embeddings [B, D].
    """

    @jax.jit
    def switched_step(params, ranges, on_S, batch):
        variables = {"params": params, RANGES: ranges, SWITCHES: _switches(sites, on_S)}
        if fidelity:
            features: Any = model.apply(variables, batch, method="features")
            return features.pooled_BxD
        scores: Any = model.apply(variables, batch, method="loss")
        weight_B = batch.get("example_weight", jnp.ones_like(scores.loss))
        return jnp.sum(scores.loss * weight_B), jnp.sum(scores.weight * weight_B)

    return switched_step


@jax.jit
def _lost(pooled_BxD: jax.Array, known_BxD: jax.Array, batch: Batch) -> Sums:
    """What the cosine of embeddings to those that are known lacks of 1, summed, and how many."""
    loss_B = 1.0 - cosine(pooled_BxD, known_BxD)
    weight_B = batch.get("example_weight", jnp.ones_like(loss_B))
    return jnp.sum(loss_B * weight_B), jnp.sum(weight_B)


def _switches(sites: Sequence[str], on_S: Any) -> Any:
    return traverse_util.unflatten_dict(
        {(*site.split("/"), "on"): on_S[i] for i, site in enumerate(sites)}
    )
