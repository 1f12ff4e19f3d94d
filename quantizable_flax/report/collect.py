"""A model's activations on real examples, through the taps that it has: sites, and its gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.nn.gate import Gate
from quantizable_flax.quantization.penalty import Asked
from quantizable_flax.quantization.sites import SHOWN, STATS
from quantizable_flax.report.inputs import Inputs
from quantizable_flax.report.measured import Anatomy, HeadMap, Heads, SiteFigures
from quantizable_flax.report.values import describe

QUIET_HEADS = 3  # whose maps are kept
PROBS = "/probs"
NO_TOKENS = ("embeddings/patches",)  # the pixels of the patches themselves


def collect(model: nn.Module, params: Any, inputs: Inputs) -> Anatomy:
    """Runs the model twice: for the figures of all sites, then for what passes the worst of them.

    Args:
      model: of a family, in floating point.
      params: its parameters.
      inputs: what it reads.
    """
    sites, hidden = site_figures(model, params, inputs)
    worst = max(hidden, key=lambda site: sites[site].inf_norm)
    attentions = [site.removesuffix(PROBS) for site in sites if site.endswith(PROBS)]
    x_BxTxD, heads = _shown(model, params, inputs, worst, attentions)
    length = x_BxTxD.shape[1]
    tokens_BxT = [tokens_T[-length:] for tokens_T in inputs.tokens_BxT]
    values = describe(worst, x_BxTxD, _seen(inputs.visible_BxT, length), tokens_BxT)
    picture = inputs.pictures[values.example] if inputs.pictures else None
    return Anatomy(sites, values, heads, inputs.tokens_BxT[values.example], picture)


def site_figures(
    model: nn.Module, params: Any, inputs: Inputs
) -> tuple[dict[str, SiteFigures], list[str]]:
    """Returns the figures of all sites before the head, and those whose activations are [B, T, D].

    Both in the order of the forward pass.
    """
    order: list[str] = []

    @jax.jit  # a new function, so that it is traced here
    def forward(params, batch):
        stats = _apply(model, params, batch, mutable=[STATS])[1][STATS]
        flat = traverse_util.flatten_dict(stats, sep="/")
        order.extend(flat)
        wanted = [path for path in flat if path.endswith(("/inf_norm", "/kurtosis"))]
        return {path: jnp.mean(flat[path], axis=0) for path in wanted}

    means = jax.device_get(forward(params, _arrays(inputs)))
    names = [path.removesuffix("/inf_norm") for path in order if path.endswith("/inf_norm")]
    found = {
        site: SiteFigures(float(means[f"{site}/inf_norm"]), float(means[f"{site}/kurtosis"]))
        for site in names
    }
    hidden = [s for s in names if f"{s}/token_inf_norm" in order and s not in NO_TOKENS]
    return found, hidden


def _shown(
    model: nn.Module, params: Any, inputs: Inputs, worst: str, attentions: Sequence[str]
) -> tuple[np.ndarray, Heads | None]:
    """What passes the worst site, [B, T, D], and what the heads do."""
    asked = [worst, *(f"{a}{tap}" for a in attentions for tap in (PROBS, "/value/output"))]
    shown = traverse_util.unflatten_dict({(*s.split("/"), "asked"): Asked() for s in set(asked)})
    config: Any = getattr(model, "config", None)

    @jax.jit
    def forward(params, batch, visible_BxT):
        found = _apply(
            model,
            params,
            batch,
            extra={SHOWN: shown},
            mutable=[SHOWN, "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Gate),
        )[1]
        taps = traverse_util.flatten_dict(found[SHOWN], sep="/")
        gates = traverse_util.flatten_dict(found.get("intermediates", {}), sep="/")
        x_BxTxD = taps[f"{worst}/value"].astype(jnp.float32)
        example = _largest_example(x_BxTxD, visible_BxT)
        layers = [
            head_figures(
                taps[f"{name}{PROBS}/value"],
                taps[f"{name}/value/output/value"],
                _gate(gates, name, config),
                visible_BxT,
                causal=config.causal,
                example=example,
            )
            for name in attentions
        ]
        return x_BxTxD, jax.tree.map(lambda *x: jnp.stack(x), *layers) if layers else None

    x_BxTxD, layers = forward(params, _arrays(inputs), jnp.asarray(inputs.visible_BxT))
    return jax.device_get(x_BxTxD), None if layers is None else _heads(layers)


def _largest_example(x_BxTxD: jax.Array, visible_BxT: jax.Array) -> jax.Array:
    seen_BxTx1 = _seen(visible_BxT, x_BxTxD.shape[1])[..., None].astype(x_BxTxD.dtype)
    return jnp.argmax(jnp.max(jnp.abs(x_BxTxD) * seen_BxTx1, axis=(1, 2)))


def _seen(visible_BxT: Any, length: int) -> Any:
    """Of a site's own tokens: before registers come, and behind where they go, it has none."""
    return visible_BxT[:, -length:]


def _gate(gates: Mapping[str, Any], attention: str, config: Any) -> jax.Array | None:
    """The gate probabilities of an attention layer [B, T or 1, H], without the scale of tuning.

    Of a gate on each element of a head's output, their mean.
    """
    found = gates.get(f"{attention}/gate/__call__")
    return None if found is None else jnp.mean(found[0], axis=-1) / config.gate.scale


def head_figures(
    probs_BxHxTxS: jax.Array,
    value_BxSxD: jax.Array,
    gate_BxTxH: jax.Array | None,
    visible_BxT: jax.Array,
    *,
    causal: bool,
    example: jax.Array,
) -> dict[str, Any]:
    """Returns what `Heads` has of one layer, and all maps of one example.

    Args:
      probs_BxHxTxS: of the layer.
      value_BxSxD: of all heads, side by side.
      gate_BxTxH: gate probabilities, [B, T or 1, H].
      visible_BxT: False for padding.
      causal: whether a token sees no later one.
      example: the number of the one whose maps are kept.
    """
    batch, heads, length, _ = probs_BxHxTxS.shape
    value_BxSxHxK = value_BxSxD.astype(jnp.float32).reshape(batch, length, heads, -1)
    seen_BxTx1 = visible_BxT[..., None].astype(jnp.float32)
    count = jnp.sum(seen_BxTx1)
    norm_BxSxH = jnp.linalg.norm(value_BxSxHxK, axis=-1)
    mean_1x1xH = jnp.sum(norm_BxSxH * seen_BxTx1, axis=(0, 1), keepdims=True) / count
    norm_BxSxH = norm_BxSxH / jnp.maximum(mean_1x1xH, 1e-12)
    through_BxTxH = jnp.einsum("BHTS,BSH->BTH", probs_BxHxTxS, norm_BxSxH)
    if gate_BxTxH is not None:
        through_BxTxH = through_BxTxH * gate_BxTxH
    pairs = (visible_BxT[:, :, None] & visible_BxT[:, None, :])[:, None]
    if causal:
        pairs = pairs & jnp.tril(jnp.ones((1, 1, length, length), bool))
    zeros_H = jnp.sum((probs_BxHxTxS == 0.0) & pairs, axis=(0, 2, 3), dtype=jnp.float32)
    zeros_H = zeros_H / jnp.sum(pairs, dtype=jnp.float32)
    found = {
        "passes": jnp.sum(through_BxTxH * seen_BxTx1, axis=(0, 1)) / count,
        "zeros": zeros_H,
        "probs": probs_BxHxTxS[example],
        "norms": norm_BxSxH[example],
    }
    if gate_BxTxH is not None:
        found["gates"] = gate_BxTxH[example]
        found["gate_means"] = jnp.sum(gate_BxTxH * seen_BxTx1, axis=(0, 1)) / count
    return found


def _heads(layers: Mapping[str, Any]) -> Heads:
    """The heads of all layers; of the maps, only those that are kept leave the device."""
    small = {
        name: layers[name] for name in ("passes", "zeros", "gates", "gate_means") if name in layers
    }
    known = jax.device_get(small)
    passes_LxH = known["passes"]
    quiet = []
    for place in np.argsort(passes_LxH, axis=None, kind="stable")[:QUIET_HEADS]:
        layer, head = (int(i) for i in np.unravel_index(place, passes_LxH.shape))
        maps = jax.device_get((layers["probs"][layer, head], layers["norms"][layer, :, head]))
        quiet.append(HeadMap(layer, head, float(passes_LxH[layer, head]), *maps))
    gates = np.swapaxes(known["gates"], 1, 2) if "gates" in known else None
    return Heads(passes_LxH, known["zeros"], quiet, gates, known.get("gate_means"))


def _apply(model: Any, params: Any, batch: Any, extra: Any = None, **options: Any) -> Any:
    """The forward pass without the head, whose logits of all positions nobody looks at here."""
    method: str | Callable = "features" if hasattr(model, "features") else "loss"
    return model.apply({"params": params, **(extra or {})}, batch, method=method, **options)


def _arrays(inputs: Inputs) -> dict[str, jax.Array]:
    return {key: jnp.asarray(x) for key, x in inputs.batch.items()}
