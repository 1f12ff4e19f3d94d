"""The original's names of quantizers, its quantization options, and ours for them."""

import re
from typing import Any

from quantizable_flax import QuantSpec

SITES = {
    "embeddings.sum_input_token_type_embd_act_quantizer": "embeddings/word_type_sum",
    "embeddings.sum_pos_embd_act_quantizer": "embeddings/position_sum",
    "attention.self.attn_scores_act_quantizer": "attention/scores",
    "attention.self.attn_probs_act_quantizer": "attention/probs",
    "attention.self.context_act_quantizer": "attention/context",
    "attention.output.res_act_quantizer": "attention_residual",
    "output.res_act_quantizer": "ffn_residual",
}
MODULES = {
    "embeddings.word_embeddings": "embeddings/word",
    "embeddings.position_embeddings": "embeddings/position",
    "embeddings.token_type_embeddings": "embeddings/token_type",
    "embeddings.LayerNorm": "embeddings/layer_norm",
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/output",
    "attention.output.LayerNorm": "attention_layer_norm",
    "intermediate.0": "ffn_in",
    "output.dense": "ffn_out",
    "output.LayerNorm": "ffn_layer_norm",
}


def our_site(original: str) -> str:
    """Returns the path of the range that belongs to one of the original's quantizers."""
    module, quantizer = original.removeprefix("bert.").rsplit(".", 1)
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", module)
    prefix, module = (f"layer_{layer[1]}/", layer[2]) if layer else ("", module)
    if module in SITES:
        return f"{prefix}{SITES[module]}/range"
    kind = "weight" if quantizer == "weight_quantizer" else "output"
    return f"{prefix}{MODULES[module]}/{kind}/range"


def our_spec(options: dict[str, Any]) -> QuantSpec:
    """Returns the spec for the `kw` of a golden case."""
    return QuantSpec(
        weight_bits=None if options.get("no_weight") else options["n_bits"],
        activation_bits=None if options.get("no_act") else options["n_bits_act"],
        weight_estimator=options["weights"].lower(),
        weight_per_channel=options.get("per_channel", False),
        percentile=options.get("percentile"),
        activation_symmetric=options.get("qmethod_act") == "sym",
    )
