"""What BERT's weights are called by transformers, and `alpha` by the original implementation."""

from quantizable_flax.models.weights import Gate, WeightNames, below

TRANSFORMERS = WeightNames(
    source="transformers",
    anchor="embeddings.position_embeddings.weight",
    roots=("bert.",),
    head="cls.predictions",
    whole="BertForMaskedLM",
    names={
        "embeddings/word": "{root}embeddings.word_embeddings",
        "embeddings/position": "{root}embeddings.position_embeddings",
        "embeddings/token_type": "{root}embeddings.token_type_embeddings",
        "embeddings/layer_norm": "{root}embeddings.LayerNorm",
        "mlm_head/dense": "cls.predictions.transform.dense",
        "mlm_head/layer_norm": "cls.predictions.transform.LayerNorm",
        "mlm_head/bias": "cls.predictions.bias",
        **below(
            "layer_{i}/",
            "{root}encoder.layer.{i}.",
            {
                "attention/query": "attention.self.query",
                "attention/key": "attention.self.key",
                "attention/value": "attention.self.value",
                "attention/gate": Gate("attention.self.alpha"),
                "attention/output": "attention.output.dense",
                "attention_layer_norm": "attention.output.LayerNorm",
                "ffn_in": "intermediate.dense",
                "ffn_out": "output.dense",
                "ffn_layer_norm": "output.LayerNorm",
            },
        ),
    },
    tied={
        "embeddings/word/embedding": "cls.predictions.decoder.weight",
        "mlm_head/bias": "cls.predictions.decoder.bias",
    },
    unused=(
        "{root}pooler.dense.weight",
        "{root}pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
    positions=("{root}embeddings.position_ids",),
)
NAMES = (TRANSFORMERS,)
