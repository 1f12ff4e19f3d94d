"""Configurations of BERT (arXiv 1810.04805), RoBERTa (1907.11692) and DistilBERT (1910.01108)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from quantizable_flax.errors import check_at_least, check_choice
from quantizable_flax.models.bert_names import bert_names, distilbert_names, roberta_names
from quantizable_flax.models.features import POOLINGS
from quantizable_flax.models.registers import check_registers
from quantizable_flax.models.structure import POST_LN, OutlierSites, attention_fold
from quantizable_flax.models.transformer import TransformerConfig
from quantizable_flax.models.weights import WeightNames

HEADS = ("masked_lm", "classifier", "pooler", "none")


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """Sizes and switches; the defaults are BERT-base. Lengths in tokens.

    Attributes:
      vocab_size: rows of the word table, at least the tokenizer's tokens.
      max_position_embeddings: rows of the position table, at least data.seq_len.
      type_vocab_size: rows of the table of token types, 0 for no such table.
      head: what stands behind the layers: "masked_lm"; "classifier" of whole sequences; "pooler",
        its first half, which bare encoders are published with; "none", hidden states alone.
      num_classes: of the classifier.
      pooling: what is a sequence's embedding: "mean" of its hidden states, or "cls", the first.
      max_predictions: 0 computes the loss over all positions; n > 0 gathers the first n labelled
        positions of each sequence before the decoder, so no sequence may have more than n labels.
      pad_token_id: its embedding row gets no gradient from the lookup, None for no such row.
      num_registers: learned tokens before the text, without position and label, which all tokens
        see (arXiv 2309.16588).
    """

    data: ClassVar[str] = "masked text"
    position_offset: ClassVar[int] = 0  # rows of the position table before the first position
    pooler_activation: ClassVar[Any] = staticmethod(jnp.tanh)

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = None
    max_predictions: int = 0
    head: str = "masked_lm"
    num_classes: int = 2
    pooling: str = "mean"
    num_registers: int = 0

    # Feed-forward output, the LayerNorm after it, and (infinity norm only) that LayerNorm's input.
    outlier_sites = OutlierSites(
        inf_norm=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output|ffn_residual)",
        kurtosis=r"layer_\d+/(ffn_out/output|ffn_layer_norm/output)",
    )
    folds = (
        attention_fold(
            "embeddings/layer_norm", "layer_0", residual="layer_0/attention_residual_scale"
        ),
        *POST_LN,
    )

    def __post_init__(self):
        """Raises UserError for another head or pooling, or no class."""
        super().__post_init__()
        check_choice("model.head", self.head, HEADS)
        check_choice("model.pooling", self.pooling, POOLINGS)
        check_at_least(1, "model.num_classes", self.num_classes)
        check_registers(self.num_registers)

    @property
    def weight_names(self) -> tuple[WeightNames, ...]:  # type: ignore[override]
        """The names of transformers, which depend on the head."""
        return (bert_names(self.head),)

    def length(self, data: Mapping[str, Any]) -> int:
        """The tokens of an example, and the registers."""
        return super().length(data) + self.num_registers

    def head_products(self, tokens: int) -> int:
        """Transform and word table, at each position that is predicted; or of the first token."""
        tokens -= self.num_registers
        if self.head == "none":
            return 0
        if self.head != "masked_lm":
            classes = self.num_classes if self.head == "classifier" else 0
            return self.hidden_size * (self.hidden_size + classes)
        predictions = min(self.max_predictions or tokens, tokens)
        return predictions * (self.hidden_size**2 + self.hidden_size * self.vocab_size)


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The defaults are RoBERTa-base; XLM-R is one too.

    Positions count the visible tokens and have rows 2 and on, padding has row 1.
    """

    position_offset: ClassVar[int] = 2

    vocab_size: int = 50265
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5

    @property
    def weight_names(self) -> tuple[WeightNames, ...]:  # type: ignore[override]
        """The names of transformers, which depend on the head."""
        return (roberta_names(self.head),)


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """The defaults are DistilBERT-base: no token types, ReLU in the classifier."""

    pooler_activation: ClassVar[Any] = staticmethod(nn.relu)

    num_layers: int = 6
    type_vocab_size: int = 0

    @property
    def weight_names(self) -> tuple[WeightNames, ...]:  # type: ignore[override]
        """The names of transformers, which depend on the head."""
        return (distilbert_names(self.head),)
