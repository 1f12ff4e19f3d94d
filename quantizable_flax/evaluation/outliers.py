"""Outlier metrics of a model from the `stats` that its sites recorded."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import check_choice
from quantizable_flax.models.structure import OutlierSites

ROWS = ("published", "sequence", "token")


def outlier_sites(model: nn.Module, rows: str = "published") -> OutlierSites:
    """Returns the sites of a model, with the rows that `config.eval.outliers` asks for.

    Raises:
      UserError: `rows` is none of published, sequence, token.
    """
    check_choice("eval.outliers", rows, ROWS)
    sites = model.config.outlier_sites
    if rows == "published":
        return sites
    return dataclasses.replace(sites, per_token=r".*" if rows == "token" else "", repeated="")


def published_stats(stats: Any, sites: OutlierSites) -> dict[str, jax.Array]:
    """Keeps the statistics that the published metrics use, as `site:statistic` -> [B].

    Everything else is dropped inside the jitted step, so that XLA never computes it.
    """
    flat = traverse_util.flatten_dict(stats, sep="/")
    kept = {}
    for statistic, pattern in (("inf_norm", sites.inf_norm), ("kurtosis", sites.kurtosis)):
        for path, value in flat.items():
            site, _, name = path.rpartition("/")
            if name == statistic and re.fullmatch(pattern, site):
                per_token = re.fullmatch(sites.per_token, site)
                chosen = flat[f"{site}/token_{statistic}"] if per_token else value
                kept[f"{site}:{statistic}"] = chosen
                if re.fullmatch(sites.repeated, site):
                    kept[f"{site}/again:{statistic}"] = chosen
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
