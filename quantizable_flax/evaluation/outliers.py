"""Outlier metrics of a model from the `stats` that its sites recorded."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from quantizable_flax.errors import check_choice


@dataclasses.dataclass(frozen=True)
class OutlierSites:
    """Which sites a family's published figures are taken over, as regular expressions.

    Attributes:
      inf_norm: full matches count for the maximum infinity norm.
      kurtosis: full matches count for the average kurtosis.
      per_token: full matches have tokens as rows in the published figures, all others samples.
      repeated: full matches count twice, as the original knows them by two names.
    """

    inf_norm: str
    kurtosis: str
    per_token: str = ""
    repeated: str = ""


# Feed-forward output, the LayerNorm after it, and (infinity norm only) that LayerNorm's input.
BERT_SITES = OutlierSites(
    inf_norm=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output|ffn_residual)",
    kurtosis=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output)",
)
# Final LayerNorm; by layer its output, FFN output, both LayerNorms and the attention projection.
_OPT = (
    r"final_layer_norm/output|layer_\d+/"
    r"({output}|ffn_out/output|(attention|ffn)_layer_norm/output|attention/output/output)"
)
OPT_SITES = OutlierSites(
    inf_norm=_OPT.format(output="ffn_residual"),
    kurtosis=_OPT.format(output="ffn_residual"),
    # The original flattens tokens before the FFN, so that its hooks see rows of tokens there.
    per_token=r"layer_\d+/(ffn_out|ffn_layer_norm)/output",
)
_VIT = r"final_layer_norm/output|layer_\d+/(ffn_residual|(ffn_out|\w+_layer_norm)/output)"
VIT_SITES = OutlierSites(inf_norm=_VIT, kurtosis=_VIT)
SITES = {"bert": BERT_SITES, "opt": OPT_SITES, "vit": VIT_SITES}
ROWS = ("published", "sequence", "token")


def outlier_sites(config: ConfigDict) -> OutlierSites:
    """Returns the sites of `config.model` with the rows that `config.eval.outliers` asks for.

    Raises:
      UserError: `eval.outliers` is none of published, sequence, token.
    """
    rows = config.eval.outliers
    check_choice("eval.outliers", rows, ROWS)
    sites = SITES[config.model.name]
    if config.model.name == "opt" and not config.model.pre_layer_norm:
        # Post-LN: a layer ends in its LayerNorm, and that one sees whole sequences.
        post = _OPT.format(output="ffn_layer_norm/output")
        sites = OutlierSites(
            post,
            post,
            per_token=r"layer_\d+/ffn_out/output",
            repeated=r"layer_\d+/ffn_layer_norm/output",  # as such, and as the layer's output
        )
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
