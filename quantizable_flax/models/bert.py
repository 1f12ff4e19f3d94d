"""BERT for masked language modelling: post-LN, erf GELU, tied decoder (arXiv 1810.04805)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.bert_names import NAMES
from quantizable_flax.models.losses import Scores, chunked_scores, select_labelled, token_scores
from quantizable_flax.models.metric import PERPLEXITY
from quantizable_flax.models.structure import POST_LN, OutlierSites, attention_fold
from quantizable_flax.models.transformer import (
    TransformerConfig,
    check_positions,
    gelu,
    residual,
    run_layers,
)
from quantizable_flax.nn.layers import Dropout, Embed, is_training, partitioned_param
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.tensor import Tensor, beside, values


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """Sizes and switches; the defaults are BERT-base. Lengths in tokens.

    Attributes:
      vocab_size: rows of the word table, at least the tokenizer's tokens.
      max_position_embeddings: rows of the position table, at least data.seq_len.
      type_vocab_size: rows of the table of token types.
      max_predictions: 0 computes the loss over all positions; n > 0 gathers the first n labelled
        positions of each sequence before the decoder, so no sequence may have more than n labels.
      pad_token_id: its embedding row gets no gradient from the lookup, None for no such row.
    """

    data: ClassVar[str] = "masked text"
    weight_names = NAMES

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = None
    max_predictions: int = 0

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

    def head_products(self, tokens: int) -> int:
        """Transform and word table, at each position that is predicted."""
        predictions = min(self.max_predictions or tokens, tokens)
        return predictions * (self.hidden_size**2 + self.hidden_size * self.vocab_size)


class BertEmbeddings(nn.Module):
    """Sum of word, token-type and position embeddings, LayerNorm, dropout."""

    config: BertConfig

    def setup(self):
        """Declares the tables; `word` is shared with the decoder."""
        c = self.config
        self.word = c.tied_embed(c.vocab_size, ("vocab", "embed"), frozen_id=c.pad_token_id)
        self.token_type = c.embed(c.type_vocab_size, (None, "embed"))
        self.position = c.embed(c.max_position_embeddings, (None, "embed"))
        self.word_type_sum = Site(c.quant)
        self.position_sum = Site(c.quant)
        self.layer_norm = c.layer_norm()
        self.dropout = Dropout(c.hidden_dropout)

    def __call__(
        self, input_ids_BxT: jax.Array, token_type_ids_BxT: jax.Array | None, *, train: bool
    ) -> Tensor:
        """Returns [B, T, D]."""
        length = input_ids_BxT.shape[1]
        check_positions(length, self.config.max_position_embeddings)
        types: jax.Array | slice = slice(1) if token_type_ids_BxT is None else token_type_ids_BxT
        word = self.word(input_ids_BxT)
        x = self.word_type_sum(word + beside(self.token_type(types), word))
        x = self.position_sum(values(x) + beside(self.position(slice(length)), x))
        return self.dropout(self.layer_norm(x), deterministic=not train)


class BertLayer(nn.Module):
    """Attention and FFN, each followed by dropout, residual sum and LayerNorm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxTxD: Tensor, mask: jax.Array | None, *, train: bool) -> Tensor:
        """Returns [B, T, D]; mask broadcasts to [B, H, T, T]."""
        c = self.config
        y = c.attention(name="attention")(x_BxTxD, mask, train=train)
        x_BxTxD = self._add_and_norm("attention", x_BxTxD, y, train)
        y = c.dense(c.intermediate_size, ("embed", "mlp"), activation=gelu, name="ffn_in")(x_BxTxD)
        y = c.dense(c.hidden_size, ("mlp", "embed"), name="ffn_out")(y)
        return self._add_and_norm("ffn", x_BxTxD, y, train)

    def _add_and_norm(self, block: str, x: Tensor, y: Tensor, train: bool) -> Tensor:
        c = self.config
        x = residual(c, block, x, y, train=train)
        return c.layer_norm(name=f"{block}_layer_norm")(x)


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm before the tied decoder; in floating point in all that was published.

    `quant.coverage=all` quantizes it like every other layer, which is an extension of ours.
    """

    config: BertConfig

    def setup(self):
        """Declares what stands before the decoder, and its bias."""
        c, quant = self.config, self.config.head_quant
        self.dense = c.dense(c.hidden_size, ("embed", "mlp"), activation=gelu, quant=quant)
        self.layer_norm = c.layer_norm(quant=quant and quant.for_layer_norm())
        self.bias = partitioned_param(
            self, "bias", nn.initializers.zeros, (c.vocab_size,), ("vocab",)
        )
        self.logits = Site(quant)

    def __call__(self, x: Tensor, word: Embed) -> jax.Array:
        """[..., D] -> float32 logits [..., V]."""
        logits = word.decoder()(self._transform(x))
        return values(self.logits(logits + beside(self.bias, logits)))

    def scores(self, x_BxTxD: Tensor, word: Embed, labels_BxT: jax.Array) -> Scores:
        """Scores the labels, the logits of so many positions at a time as configured."""
        c = self.config
        if c.head_quant is not None:
            return token_scores(self(x_BxTxD, word), labels_BxT)
        attend, bias_1x1xV = word.decoder(), beside(self.bias, x_BxTxD)
        return chunked_scores(
            lambda x: attend(x) + bias_1x1xV,
            values(self._transform(x_BxTxD)),
            labels_BxT,
            c.loss_chunk,
        )

    def _transform(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.dense(x if self.config.head_quant is not None else values(x)))


class BertForMaskedLM(nn.Module):
    """The whole model; `loss` is what training and evaluation call."""

    config: BertConfig
    metric = PERPLEXITY
    has_final_layer_norm = False

    def setup(self):
        """Declares embeddings, layers and head."""
        c = self.config
        self.embeddings = BertEmbeddings(c)
        self.layers = [BertLayer(c, name=f"layer_{i}") for i in range(c.num_layers)]
        self.mlm_head = MlmHead(c)

    def encode(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the last hidden states [B, T, D]."""
        return values(self._encode(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, train))

    def _encode(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None,
        token_type_ids_BxT: jax.Array | None,
        train: bool,
    ) -> Tensor:
        x = self.embeddings(input_ids_BxT, token_type_ids_BxT, train=train)
        mask = None
        if attention_mask_BxT is not None:
            mask = attention_mask_BxT.astype(bool)[:, None, None, :]
        return run_layers(self.config, self.layers, x, mask, train=train)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        train: bool = False,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, T, V].

        Args:
          input_ids_BxT: token ids; T at most `max_position_embeddings`.
          attention_mask_BxT: 1 for a token, 0 for padding; None shows every token.
          token_type_ids_BxT: segment ids; None means all 0.
          train: True applies dropout and needs a "dropout" rng.
          deterministic: the opposite of `train`, as Flax's modules take it; None leaves it to that.
        """
        train = is_training(train, deterministic)
        x = self._encode(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, train)
        return self.mlm_head(x, self.embeddings.word)

    def loss(self, batch: dict[str, jax.Array], *, train: bool = False) -> Scores:
        """Scores the labelled tokens.

        Args:
          batch: `input_ids` and `labels` [B, T] (-100: no label), optionally `attention_mask`
            and `token_type_ids`.
          train: as in `__call__`.
        """
        x_BxTxD = self._encode(
            batch["input_ids"],
            batch.get("attention_mask"),
            batch.get("token_type_ids"),
            train,
        )
        labels_BxT = batch["labels"]
        if self.config.max_predictions:
            x_BxTxD, labels_BxT = select_labelled(x_BxTxD, labels_BxT, self.config.max_predictions)
        return self.mlm_head.scores(x_BxTxD, self.embeddings.word, labels_BxT)

    def example_batch(self) -> dict[str, jax.Array]:
        """The smallest batch that the model can be initialised with."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": ids, "labels": ids}
