"""Keys that another key leaves without effect: they are told, for nothing else shows it."""

from collections.abc import Iterator
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from quantizable_flax.config import default_config

# A key, the value at which it asks for nothing, and what then has no effect. Without gate_init_std,
# which recipes set for whichever gate is chosen.
SWITCHES = (
    ("quant.train", False, ("quant.train_setting",)),
    (
        "model.attention.gate",
        "none",
        tuple(f"model.attention.gate_{name}" for name in ("pooling", "pi_init", "finetune")),
    ),
    (
        "optimizer.name",
        "adamw",
        tuple(f"optimizer.muon_{name}" for name in ("learning_rate", "momentum", "parameters")),
    ),
    ("penalty.weight", 0.0, tuple(f"penalty.{name}" for name in ("scale", "power", "sites"))),
)


def without_effect(config: ConfigDict) -> Iterator[str]:
    """Yields a sentence for each key that differs from its default for nothing."""
    known, given = (_flat(c) for c in (default_config(config.model.name), config))
    for switch, off, keys in SWITCHES:
        if given[switch] != off:
            continue
        for key in keys:
            if given[key] != known[key]:
                yield f"{key}={given[key]} has no effect with {switch}={off}."


def _flat(config: ConfigDict) -> dict[str, Any]:
    return traverse_util.flatten_dict(config.to_dict(), sep=".")
