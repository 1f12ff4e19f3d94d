"""Which gates the weights of the original implementation have: it notes them nowhere."""

import re
from collections.abc import Mapping
from typing import Any

# Of the first layer: one parameter, one Linear, or for each head a Linear or two of them.
KINDS = (
    (r"alpha", "unconditional"),
    (r"alpha\.weight", "all_heads_linear"),
    (r"alpha\.0\.weight", "linear"),
    (r"alpha\.0\.0\.weight", "mlp"),
)


def gates_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keys of `config.model.attention` for the gates among some tensors, {} for none."""
    for pattern, kind in KINDS:
        name = next((n for n in tensors if re.search(rf"\.0\..*\b{pattern}$", n)), None)
        if name is not None:
            hidden = {"gate_hidden": int(tensors[name].shape[0])} if kind == "mlp" else {}
            return {"gate": kind, **hidden}
    return {}
