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
EMBEDDINGS: dict[str, Names | Stored] = {
    "embeddings/word": "{root}embeddings.word_embeddings",
    "embeddings/position": "{root}embeddings.position_embeddings",
    "embeddings/token_type": "{root}embeddings.token_type_embeddings",
    "embeddings/layer_norm": "{root}embeddings.LayerNorm",
}
MLM = "masked_lm"
TIED = ("embeddings/word/embedding", "mlm_head/bias")  # of that head


def bert_names(head: str) -> WeightNames:
    """BERT's: BertForMaskedLM, BertForSequenceClassification, or BertModel by itself."""
    names = {
        "mlm_head/dense": "cls.predictions.transform.dense",
        "mlm_head/layer_norm": "cls.predictions.transform.LayerNorm",
        "mlm_head/bias": "cls.predictions.bias",
        "pooler": "{root}pooler.dense",
        "classifier": "classifier",
        **below("layer_{i}/", "{root}encoder.layer.{i}.", BERT_LAYER),
    }
    return _names(
        "Bert",
        head,
        names,
        mlm="cls.predictions",
        tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        unused=(
            *_pooler(head in ("classifier", "pooler")),
            "cls.seq_relationship.weight",
            "cls.seq_relationship.bias",
        ),
    )


def roberta_names(head: str) -> WeightNames:
    """RoBERTa's, whose classifier has a pooler of its own."""
    names = {
        "mlm_head/dense": "lm_head.dense",
        "mlm_head/layer_norm": "lm_head.layer_norm",
        "mlm_head/bias": "lm_head.bias",
        "pooler": "classifier.dense" if head == "classifier" else "{root}pooler.dense",
        "classifier": "classifier.out_proj",
        **below("layer_{i}/", "{root}encoder.layer.{i}.", BERT_LAYER),
    }
    return _names(
        "Roberta",
        head,
        names,
        mlm="lm_head",
        tied=("lm_head.decoder.weight", "lm_head.decoder.bias"),
        unused=_pooler(head == "pooler"),
    )


def distilbert_names(head: str) -> WeightNames:
    """DistilBERT's, without a table of token types."""
    names = {
        "mlm_head/dense": "vocab_transform",
        "mlm_head/layer_norm": "vocab_layer_norm",
        "mlm_head/bias": "vocab_projector.bias",
        "pooler": "pre_classifier",
        "classifier": "classifier",
        **below("layer_{i}/", "{root}transformer.layer.{i}.", DISTILBERT_LAYER),
    }
    return _names(
        "DistilBert", head, names, mlm="vocab_transform", tied=("vocab_projector.weight",)
    )


def _names(
    classes: str,
    head: str,
    names: Mapping[str, Names | Stored],
    *,
    mlm: str,
    tied: tuple[str, ...],
    unused: tuple[str, ...] = (),
) -> WeightNames:
    """What all of them share.

    Args:
      classes: what the names of the classes begin with, and in small letters those of the body.
      head: as `BertConfig.head`.
      names: behind the embeddings.
      mlm: what the names of the masked-LM head begin with.
      tied: the second names of the word table, and of the masked-LM head's bias if it has one.
      unused: as in `WeightNames`.
    """
    alone = head in ("none", "pooler")  # such an encoder is saved without a root
    return WeightNames(
        source="transformers",
        anchor="embeddings.position_embeddings.weight",
        roots=("",) if alone else (f"{classes.lower()}.",),
        heads={
            "mlm_head": (mlm, f"{classes}ForMaskedLM"),
            "classifier": ("classifier", f"{classes}ForSequenceClassification"),
        },
        names={**EMBEDDINGS, **names},
        tied=dict(zip(TIED, tied, strict=False)) if head == MLM else {},
        unused=unused,
        positions=("{root}embeddings.position_ids",),
    )


def _pooler(has_place: bool) -> tuple[str, ...]:
    """Checkpoints for other things than classes may bring a pooler along."""
    return () if has_place else ("{root}pooler.dense.weight", "{root}pooler.dense.bias")
