"""What transformers calls our configuration keys: a table for each `model_type`, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Form:
    """One `model_type`.

    Attributes:
      family: ours.
      classes: what the names of its classes begin with.
      fields: key of config.json -> (key of `config.model`, what transformers takes without it).
      fixed: key of config.json -> the value that our models compute with, also without the key.
      heads: (what a class is called behind `classes`, the keys of `config.model` that it means), in
        the order in which they are tried when a model is written.
      position_offset: rows of the position table that its `max_position_embeddings` counts too.
      needs: key of `config.model` -> the only value that its models compute with.
    """

    family: str
    classes: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    heads: tuple[tuple[str, Mapping[str, Any]], ...]
    position_offset: int = 0
    needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of its classes that we know."""
        return tuple(dict.fromkeys(self.classes + suffix for suffix, _ in self.heads))


LAYERS = {
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "initializer_range": ("initializer_range", 0.02),
}
BERT = {
    **LAYERS,
    "hidden_dropout_prob": ("hidden_dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "vocab_size": ("vocab_size", 30522),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "pad_token_id": ("pad_token_id", 0),
}
ROBERTA = {**BERT, "vocab_size": ("vocab_size", 50265), "pad_token_id": ("pad_token_id", 1)}
DISTILBERT = {
    "dim": ("hidden_size", 768),
    "n_layers": ("num_layers", 6),
    "n_heads": ("num_heads", 12),
    "hidden_dim": ("intermediate_size", 3072),
    "initializer_range": ("initializer_range", 0.02),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "vocab_size": ("vocab_size", 30522),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "pad_token_id": ("pad_token_id", 0),
}
OPT = {
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "ffn_dim": ("intermediate_size", 3072),
    "init_std": ("initializer_range", 0.02),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "vocab_size": ("vocab_size", 50272),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "do_layer_norm_before": ("pre_layer_norm", True),
    "word_embed_proj_dim": ("embed_size", None),
    "pad_token_id": ("pad_token_id", 1),
}
VIT = {
    **LAYERS,
    "hidden_dropout_prob": ("hidden_dropout", 0.0),
    "attention_probs_dropout_prob": ("attention_dropout", 0.0),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "num_channels": ("channels", 3),
}
ENCODER = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
CLASSIFIER = ("ForSequenceClassification", {"head": "classifier"})
BERT_HEADS = (
    ("ForMaskedLM", {"head": "masked_lm"}),
    CLASSIFIER,
    ("Model", {"head": "pooler"}),
    ("Model", {"head": "none"}),
)
_IMAGES = {"hidden_act": "gelu", "qkv_bias": True}
_PLAIN = {"num_registers": 0, "patch_layer_norm": False}
_TEXT = {"num_registers": 0}
_ROBERTA = Form("roberta", "Roberta", ROBERTA, ENCODER, BERT_HEADS, position_offset=2, needs=_TEXT)

FORMS: dict[str, Form] = {
    "bert": Form(
        "bert",
        "Bert",
        BERT,
        ENCODER,
        (*BERT_HEADS, ("ForPreTraining", {"head": "masked_lm"})),
        needs=_TEXT,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, classes="XLMRoberta"),
    "distilbert": Form(
        "distilbert",
        "DistilBert",
        DISTILBERT,
        {"activation": "gelu", "tie_word_embeddings": True},
        (("ForMaskedLM", {"head": "masked_lm"}), CLASSIFIER, ("Model", {"head": "none"})),
        needs={"layer_norm_eps": 1e-12, "type_vocab_size": 0, **_TEXT},
    ),
    "opt": Form(
        "opt",
        "OPT",
        OPT,
        {
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "tie_word_embeddings": True,
        },
        (("ForCausalLM", {}), ("Model", {})),
        needs={"layer_norm_eps": 1e-5, **_TEXT},
    ),
    "vit": Form(
        "vit",
        "ViT",
        VIT,
        _IMAGES,
        (
            ("Model", {"num_classes": 0, "distillation": "none"}),
            ("ForImageClassification", {"distillation": "none"}),
        ),
        needs=_PLAIN,
    ),
    "deit": Form(
        "vit",
        "DeiT",
        VIT,
        _IMAGES,
        (
            ("Model", {"num_classes": 0, "distillation": "token"}),
            ("ForImageClassification", {"distillation": "token"}),
            ("ForImageClassificationWithTeacher", {"distillation": "head"}),
        ),
        needs=_PLAIN,
    ),
}
