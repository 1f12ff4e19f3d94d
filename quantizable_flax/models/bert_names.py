"""What transformers calls the weights of BERT and its kin, and the original calls `alpha`."""

from collections.abc import Mapping

from quantizable_flax.models.weights import Gate, Names, Stored, WeightNames, below

BERT_LAYER: dict[str, Names | Stored] = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/gate": Gate("attention.self.alpha"),
    "attention/output": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_layer_norm": "output.LayerNorm",
}
DISTILBERT_LAYER: dict[str, Names | Stored] = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/gate": Gate("attention.alpha"),
    "attention/output": "attention.out_lin",
    "attention_layer_norm": "sa_layer_norm",
    "ffn_in": "ffn.lin1",
    "ffn_out": "ffn.lin2",
    "ffn_layer_norm": "output_layer_norm",
}
MLM = "masked_lm"


def bert_names(head: str) -> WeightNames:
    """BERT's: BertForMaskedLM, BertForSequenceClassification, or BertModel by itself."""
    return WeightNames(
        source="transformers",
        anchor="embeddings.position_embeddings.weight",
        roots=_roots("bert.", head),
        heads=_heads(head, "cls.predictions", "Bert"),
        names={
            **_embeddings(),
            "mlm_head/dense": "cls.predictions.transform.dense",
            "mlm_head/layer_norm": "cls.predictions.transform.LayerNorm",
            "mlm_head/bias": "cls.predictions.bias",
            "pooler": "{root}pooler.dense",
            "classifier": "classifier",
            **below("layer_{i}/", "{root}encoder.layer.{i}.", BERT_LAYER),
        },
        tied=_tied("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", head),
        unused=(
            *_pooler(head in ("classifier", "pooler")),
            "cls.seq_relationship.weight",
            "cls.seq_relationship.bias",
        ),
        positions=("{root}embeddings.position_ids",),
    )


def roberta_names(head: str) -> WeightNames:
    """RoBERTa's, whose classifier has a pooler of its own."""
    return WeightNames(
        source="transformers",
        anchor="embeddings.position_embeddings.weight",
        roots=_roots("roberta.", head),
        heads=_heads(head, "lm_head", "Roberta"),
        names={
            **_embeddings(),
            "mlm_head/dense": "lm_head.dense",
            "mlm_head/layer_norm": "lm_head.layer_norm",
            "mlm_head/bias": "lm_head.bias",
            "pooler": "classifier.dense" if head == "classifier" else "{root}pooler.dense",
            "classifier": "classifier.out_proj",
            **below("layer_{i}/", "{root}encoder.layer.{i}.", BERT_LAYER),
        },
        tied=_tied("lm_head.decoder.weight", "lm_head.decoder.bias", head),
        unused=_pooler(head == "pooler"),
        positions=("{root}embeddings.position_ids",),
    )


def distilbert_names(head: str) -> WeightNames:
    """DistilBERT's, without a table of token types."""
    return WeightNames(
        source="transformers",
        anchor="embeddings.position_embeddings.weight",
        roots=_roots("distilbert.", head),
        heads=_heads(head, "vocab_transform", "DistilBert"),
        names={
            **_embeddings(),
            "mlm_head/dense": "vocab_transform",
            "mlm_head/layer_norm": "vocab_layer_norm",
            "mlm_head/bias": "vocab_projector.bias",
            "pooler": "pre_classifier",
            "classifier": "classifier",
            **below("layer_{i}/", "{root}transformer.layer.{i}.", DISTILBERT_LAYER),
        },
        tied=_tied("vocab_projector.weight", None, head),
        positions=("{root}embeddings.position_ids",),
    )


def _embeddings() -> dict[str, Names | Stored]:
    return {
        "embeddings/word": "{root}embeddings.word_embeddings",
        "embeddings/position": "{root}embeddings.position_embeddings",
        "embeddings/token_type": "{root}embeddings.token_type_embeddings",
        "embeddings/layer_norm": "{root}embeddings.LayerNorm",
    }


def _roots(root: str, head: str) -> tuple[str, ...]:
    """An encoder by itself is saved without a root; with one it is read too."""
    return ("",) if head in ("none", "pooler") else (root,)


def _heads(head: str, mlm: str, classes: str) -> Mapping[str, tuple[str, str]]:
    return {
        "mlm_head": (mlm, f"{classes}ForMaskedLM"),
        "classifier": ("classifier", f"{classes}ForSequenceClassification"),
    }


def _tied(weight: str, bias: str | None, head: str) -> dict[str, str]:
    if head != MLM:
        return {}
    return {"embeddings/word/embedding": weight, **({"mlm_head/bias": bias} if bias else {})}


def _pooler(has_place: bool) -> tuple[str, ...]:
    """Checkpoints for other things than classes may bring a pooler along."""
    return () if has_place else ("{root}pooler.dense.weight", "{root}pooler.dense.bias")
