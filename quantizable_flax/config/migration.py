"""Configurations that an older version stored, in the names and values of now."""

import copy
from collections.abc import Mapping
from typing import Any

from quantizable_flax.models.build import FAMILIES

# Keys of before by those of now; `POOLINGS` are values that have other names since.
RENAMED = {
    "train.accumulate": "train.grad_accum_steps",
    "model.attention.gate_per": "model.attention.gate_pooling",
    "quant.setup": "quant.coverage",
    "quant.skip": "quant.float_sites",
    "quant.bits": "quant.train_setting",
    "distill.outliers": "penalty.weight",
    "distill.outlier_scale": "penalty.scale",
    "distill.outlier_power": "penalty.power",
    "distill.outlier_sites": "penalty.sites",
}
POOLINGS = {"token": "none", "head": "visible", "head_unmasked": "all"}


def name_of_now(path: str) -> str:
    """What a sentence about an unknown key adds if it was one before, else nothing."""
    return f", which is {RENAMED[path]} now" if path in RENAMED else ""


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns stored values, `json.loads(to_json(config))`, by the keys of this version."""
    found = copy.deepcopy(dict(values))
    attention = _group(found, ["model", "attention"])
    if attention is not None and "gate_per" in attention:
        attention["gate_per"] = _pooling(attention, found["model"].get("name"))
    for old, new in RENAMED.items():
        *path, key = old.split(".")
        group = _group(found, path)
        if group is not None and key in group:
            *path, name = new.split(".")
            _group(found, path, make=True)[name] = group.pop(key)
    return found


def _group(values: dict[str, Any], path: list[str], *, make: bool = False) -> Any:
    """The group of keys at a path, None where there is none and none is made."""
    found: Any = values
    for key in path:
        if make and isinstance(found, dict):
            found.setdefault(key, {})
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _pooling(attention: dict[str, Any], family: Any) -> Any:
    """What `gate_per` is called now.

    Versions without `blind_queries` averaged over all positions under the name of `head`. Families
    that are not causal were trained on whole sequences, where the two are the same.
    """
    per = attention["gate_per"]
    before = "blind_queries" not in attention
    conditional = attention.get("gate") not in ("none", "unconditional")
    causal = family in FAMILIES and FAMILIES[family].config.causal
    if per == "head" and before and conditional and causal:
        return "all"
    return POOLINGS.get(per, per)
