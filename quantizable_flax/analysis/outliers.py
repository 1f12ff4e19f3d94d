"""Outlier metrics of a model from the `stats` that its sites recorded."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class OutlierSites:
    """Which sites a family's published figures are taken over, as regular expressions.

    Attributes:
      inf_norm: full matches count for the maximum infinity norm.
      kurtosis: full matches count for the average kurtosis.
    """

    inf_norm: str
    kurtosis: str


# Feed-forward output, the LayerNorm after it, and (infinity norm only) that LayerNorm's input.
BERT_SITES = OutlierSites(
    inf_norm=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output|ffn_residual)",
    kurtosis=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output)",
)
SITES = {"bert": BERT_SITES}


def published_stats(stats: Any, sites: OutlierSites) -> dict[str, jax.Array]:
    """Keeps the statistics that the published metrics use, as `site:statistic` -> [B].

    Everything else is dropped inside the jitted step, so that XLA never computes it.
    """
    flat = traverse_util.flatten_dict(stats, sep="/")
    patterns = {"inf_norm": sites.inf_norm, "kurtosis": sites.kurtosis}
    kept = {}
    for path, value in flat.items():
        site, _, statistic = path.rpartition("/")
        if statistic in patterns and re.fullmatch(patterns[statistic], site):
            kept[f"{site}:{statistic}"] = value
    return kept


def summarise(means: Mapping[str, float]) -> dict[str, float]:
    """Maximum infinity norm and average kurtosis over the sites of `published_stats`."""
    norms = [value for name, value in means.items() if name.endswith(":inf_norm")]
    kurtoses = [value for name, value in means.items() if name.endswith(":kurtosis")]
    return {
        "max_inf_norm": float(np.max(norms)),
        "avg_kurtosis": float(np.mean(kurtoses)),
        "max_kurtosis": float(np.max(kurtoses)),
    }


def telemetry(stats: Any, sites: OutlierSites) -> dict[str, jax.Array]:
    """Means over a batch for training logs.

    Returns:
      `site:inf_norm` and `site:kurtosis` scalars, `.../attention:zero_share` scalars (share of
      attention probabilities that are exactly 0) and `.../gate:mean` of shape [heads].
    """
    kept = published_stats(stats, sites)
    for path, value in traverse_util.flatten_dict(stats, sep="/").items():
        site, _, statistic = path.rpartition("/")
        if statistic in ("zero_share", "mean"):
            kept[f"{site}:{statistic}"] = value
    return {name: jnp.mean(value, axis=0) for name, value in kept.items()}
