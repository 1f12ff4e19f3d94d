"""Which sites cost the most: the loss when one site alone is quantized."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from quantizable_flax.errors import UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.calibrate import calibrate, unknown_ranges
from quantizable_flax.quantization.sites import RANGES, SWITCHES

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class SiteCost(NamedTuple):
    """A site and what quantizing it alone adds to the loss, in nats per labelled item."""

    site: str
    increase: float


def sensitivity(
    model: nn.Module, params: Any, calibration: Iterable[Batch], batches: Iterable[Batch]
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

    Raises:
      UserError: no batch, or a spec that quantizes nothing.
    """
    spec = dataclasses.replace(model.config.quant, backend="simulated")
    model = with_quant(model, spec)
    example = model.example_batch()
    # With the static ranges of this very scheme, so that sites without a range are listed too.
    static = with_quant(model, dataclasses.replace(spec, activation_ranges="static"))
    sites = [
        "/".join(path[:-1])
        for path in traverse_util.flatten_dict(unknown_ranges(static, params, example))
    ]
    if not sites:
        raise UserError(
            "sensitivity needs quantized sites, found none: give --quant bits, and "
            "quant.float_sites that leave something."
        )
    off = _switches(sites, np.zeros(len(sites), bool))
    ranges = calibrate(model, params, calibration, switches=off)
    kept = [{key: jnp.asarray(value) for key, value in batch.items()} for batch in batches]
    step = make_switched_step(model, sites)

    def sums(on_S: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
        return [step(params, ranges, on_S, batch) for batch in kept]

    def loss(parts: list[tuple[jax.Array, jax.Array]]) -> float:
        total, labels = np.sum(jax.device_get(parts), axis=0)
        return float(total / labels)

    losses, running = [], sums(np.zeros(len(sites), bool))
    bar = tqdm(
        np.eye(len(sites), dtype=bool), desc="sensitivity", unit="site", leave=False, disable=None
    )
    for on_S in bar:
        following = sums(on_S)
        losses.append(loss(running))  # one site late, so the device never waits
        running = following
    exact, *losses = *losses, loss(running)
    costs = [SiteCost(site, value - exact) for site, value in zip(sites, losses, strict=True)]
    return sorted(costs, key=lambda cost: -cost.increase)


def make_switched_step(model: nn.Module, sites: Sequence[str]):
    """Returns the jitted `(params, ranges, on, batch) -> (summed loss, labels)`.

    `on` is bool [sites]: which of them quantize.
    """

    @jax.jit
    def switched_step(params, ranges, on_S, batch):
        switches = _switches(sites, on_S)
        scores: Any = model.apply(
            {"params": params, RANGES: ranges, SWITCHES: switches}, batch, method="loss"
        )
        weight_B = batch.get("example_weight", jnp.ones_like(scores.loss))
        return jnp.sum(scores.loss * weight_B), jnp.sum(scores.weight * weight_B)

    return switched_step


def _switches(sites: Sequence[str], on_S: Any) -> Any:
    return traverse_util.unflatten_dict(
        {(*site.split("/"), "on"): on_S[i] for i, site in enumerate(sites)}
    )
