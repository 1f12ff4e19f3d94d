"""Every method against outliers as keys of a configuration, for the tables of results.

Where a paper states an initial opening of a gate or a strength of a loss for models of its own
size, small ones take what lets them learn within minutes; each recipe says which.
"""

from collections.abc import Callable, Mapping
from typing import Any

from quantizable_flax.config import apply_variant

Change = Callable[[Any], None]
Keys = Mapping[str, Any]

SINGLE = {"model.norm": "rms_norm_single"}
MUON = {"optimizer.name": "muon"}


def methods(pi_init: float) -> dict[str, Keys]:
    """Name -> keys of a configuration; gates start open with the probability pi_init."""

    def gate(kind: str) -> Keys:
        return {"model.attention.gate": kind, "model.attention.gate_pi_init": pi_init}

    return {
        "vanilla": {},
        "clipped": {"model.attention.softmax": "clipped", "model.attention.alpha": 0.25},
        "gated": gate("linear"),
        "gated_mlp": gate("mlp"),
        "output_gate_head": gate("all_heads_linear"),
        "output_gate_element": gate("elementwise"),
        "value_gate": gate("value"),
        "softmax1": {"model.attention.sink": "zero"},
        "learned_sink": {"model.attention.sink": "learned"},
        "qk_norm": {"model.attention.qk_norm": True},
        "registers": {"model.num_registers": 4},
        "outlier_loss": {"penalty.weight": 0.01},
        "rms_norm_single": SINGLE,
        "muon": MUON,
        "muon_rms_norm_single": {**MUON, **SINGLE},
    }


def causal_methods(pi_init: float) -> dict[str, Keys]:
    """The same, and what a causal model has beside."""
    known = methods(pi_init)
    by_row = {**known["clipped"], "model.attention.length_normalised": True}
    return {**known, "clipped_by_row": by_row}


def beside(name: str, keys: Keys, known: Mapping[str, Keys]) -> dict[str, Keys]:
    """What may pass for an effect of the first methods: the keys alone, and beside each of them."""
    return {
        name: keys,
        **{f"{name}_{method}": {**known[method], **keys} for method in ("clipped", "gated")},
    }


def variants(known: Mapping[str, Keys]) -> dict[str, Change]:
    """The same as what `quantizable_flax.config.apply_variant` takes."""
    return {name: _change(keys) for name, keys in known.items()}


def a_run(config: Any, variant: str, known: Mapping[str, Change], steps: int) -> Any:
    """Returns a configuration with one method, that trains so long and logs how outliers grow."""
    config.train.steps = steps
    config.train.log_every = config.train.telemetry_every = 1_000
    config.train.eval_every = config.checkpoint.every = 2_000
    config.name = variant
    return apply_variant(config, variant, known)


def _change(keys: Keys) -> Change:
    return lambda config: config.update_from_flattened_dict(keys)
