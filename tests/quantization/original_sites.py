"""The original's names of quantizers, its quantization options, and ours for them."""

import dataclasses
import re
from typing import Any

from quantizable_flax import QuantSpec
from quantizable_flax.quantization.spec import parse_coverage


@dataclasses.dataclass(frozen=True)
class Names:
    """The original's names in one family.

    Attributes:
      prefix: of most of its names.
      layer: a pattern that splits a name into layer number and rest.
      sites: activations of their own -> our site.
      modules: layers with a weight and an output -> our module.
      setup: the quantization setup where a case names none.
    """

    prefix: str
    layer: str
    sites: dict[str, str]
    modules: dict[str, str]
    setup: str


BERT = Names(
    prefix="bert.",
    layer=r"encoder\.layer\.(\d+)\.(.*)",
    sites={
        "embeddings.sum_input_token_type_embd_act_quantizer": "embeddings/word_type_sum",
        "embeddings.sum_pos_embd_act_quantizer": "embeddings/position_sum",
        "attention.self.attn_scores_act_quantizer": "attention/scores",
        "attention.self.attn_probs_act_quantizer": "attention/probs",
        "attention.self.context_act_quantizer": "attention/context",
        "attention.output.res_act_quantizer": "attention_residual",
        "output.res_act_quantizer": "ffn_residual",
    },
    modules={
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
    },
    setup="fp32_head",
)
OPT = Names(
    prefix="model.decoder.",
    layer=r"layers\.(\d+)\.(.*)",
    sites={
        "embed_sum_act_quantizer": "embeddings/sum",
        "self_attn.attn_scores_act_quantizer": "attention/scores",
        "self_attn.attn_probs_act_quantizer": "attention/probs",
        "self_attn.context_act_quantizer": "attention/context",
        "self_attn_res_act_quantizer": "attention_residual",
        "ffn_res_act_quantizer": "ffn_residual",
    },
    modules={
        "embed_tokens": "embeddings/word",
        "embed_positions.quant_embedding": "embeddings/position",
        "project_in": "embeddings/project_in",
        "self_attn_layer_norm": "attention_layer_norm",
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.out_proj": "attention/output",
        "layers.final_layer_norm": "ffn_layer_norm",
        "fc1_act": "ffn_in",
        "fc2": "ffn_out",
        "final_layer_norm": "final_layer_norm",
        "project_out": "project_out",
    },
    setup="all",
)
NAMES = {"bert": BERT, "opt": OPT}
# The tied head: the word table once more, which is one site of ours, and the logits.
OPT_HEAD = {
    "lm_head.weight_quantizer": "embeddings/word/weight/range",
    "lm_head.activation_quantizer": "logits/range",
}


def our_site(original: str, family: str) -> str:
    """Returns the path of the range that belongs to one of the original's quantizers."""
    if original in OPT_HEAD:
        return OPT_HEAD[original]
    names = NAMES[family]
    module, quantizer = original.removeprefix(names.prefix).rsplit(".", 1)
    layer = re.fullmatch(names.layer, module)
    prefix, module = (f"layer_{layer[1]}/", layer[2]) if layer else ("", module)
    if module in names.sites:
        return f"{prefix}{names.sites[module]}/range"
    kind = "weight" if quantizer == "weight_quantizer" else "output"
    # OPT calls two LayerNorms alike, that of each FFN and that of the model.
    ours = names.modules.get(f"layers.{module}") if layer else None
    return f"{prefix}{ours or names.modules[module]}/{kind}/range"


def our_spec(options: dict[str, Any], family: str) -> QuantSpec:
    """Returns the spec for the `kw` of a golden case, with the original's sites alone."""
    return QuantSpec(
        weight_bits=None if options.get("no_weight") else options["n_bits"],
        activation_bits=None if options.get("no_act") else options["n_bits_act"],
        weight_estimator=options["weights"].lower(),
        weight_per_channel=options.get("per_channel", False),
        percentile=options.get("percentile"),
        activation_estimator="mse_last" if options.get("acts") == "MSE" else "minmax",
        activation_symmetric=options.get("qmethod_act") == "sym",
        gated_context=False,
        **parse_coverage(options.get("quant_setup", NAMES[family].setup)),
    )
