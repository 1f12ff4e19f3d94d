"""What others need to know of a family's architecture: where its outliers show, what folds."""

import dataclasses
from typing import NamedTuple


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


class Fold(NamedTuple):
    """A LayerNorm and all that reads its output, as paths of modules; `{i}` is a layer.

    Attributes:
      norm: the LayerNorm.
      dense: the Dense layers behind it.
      gate: the gate behind it, if the model has gates.
      residual: the `ResidualScale` of the sum that adds its output to something.
    """

    norm: str
    dense: tuple[str, ...]
    gate: str | None = None
    residual: str | None = None


def attention_fold(norm: str, layer: str, **residual: str) -> Fold:
    """A LayerNorm whose output the attention of a layer reads."""
    names = tuple(f"{layer}/attention/{name}" for name in ("query", "key", "value"))
    return Fold(norm, names, f"{layer}/attention/gate", **residual)


PRE_LN = (
    attention_fold("layer_{i}/attention_layer_norm", "layer_{i}"),
    Fold("layer_{i}/ffn_layer_norm", ("layer_{i}/ffn_in",)),
)
# The last layer's output feeds a head instead of a next layer and is left alone.
POST_LN = (
    Fold(
        "layer_{i}/attention_layer_norm",
        ("layer_{i}/ffn_in",),
        residual="layer_{i}/ffn_residual_scale",
    ),
    attention_fold(
        "layer_{i}/ffn_layer_norm",
        "layer_{next}",
        residual="layer_{next}/attention_residual_scale",
    ),
)
