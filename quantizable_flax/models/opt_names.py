"""What OPT's weights are called by transformers, and `alpha` by the original implementation."""

from quantizable_flax.models.weights import Gate, WeightNames, below

TRANSFORMERS = WeightNames(
    source="transformers",
    anchor="embed_positions.weight",
    # As OPTForCausalLM saves it, OPTModel, and the decoder by itself.
    roots=("model.decoder.", "decoder.", ""),
    names={
        "embeddings/word": "{root}embed_tokens",
        "embeddings/position": "{root}embed_positions",
        "embeddings/project_in": "{root}project_in",
        "project_out": "{root}project_out",
        "final_layer_norm": "{root}final_layer_norm",
        **below(
            "layer_{i}/",
            "{root}layers.{i}.",
            {
                "attention/query": "self_attn.q_proj",
                "attention/key": "self_attn.k_proj",
                "attention/value": "self_attn.v_proj",
                "attention/output": "self_attn.out_proj",
                "attention/gate": Gate("self_attn.alpha"),
                "attention_layer_norm": "self_attn_layer_norm",
                "ffn_in": "fc1",
                "ffn_out": "fc2",
                "ffn_layer_norm": "final_layer_norm",
            },
        ),
    },
    tied={"embeddings/word/embedding": "lm_head.weight"},
)
NAMES = (TRANSFORMERS,)
