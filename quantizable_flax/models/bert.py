"""BERT: post-LN, erf GELU; masked language modelling with a tied decoder (arXiv 1810.04805).

RoBERTa and DistilBERT are the same module by other configurations, see `bert_config.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.bert_config import BertConfig
from quantizable_flax.models.features import Features, pooled
from quantizable_flax.models.losses import (
    Scores,
    class_scores,
    no_scores,
    select_labelled,
    smooth_targets,
)
from quantizable_flax.models.metric import FIDELITY, PERPLEXITY, TOP1, Metric
from quantizable_flax.models.mlm_head import MlmHead
from quantizable_flax.models.registers import Registers, behind, shown
from quantizable_flax.models.transformer import (
    check_positions,
    gelu,
    positions,
    residual,
    run_layers,
)
from quantizable_flax.nn.layers import Dropout, is_training
from quantizable_flax.nn.mask import Mask
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.tensor import Tensor, beside, values


class BertEmbeddings(nn.Module):
    """Sum of word, token-type and position embeddings, LayerNorm, dropout."""

    config: BertConfig

    def setup(self):
        """Declares the tables; `word` is shared with the decoder."""
        c = self.config
        self.word = c.tied_embed(c.vocab_size, ("vocab", "embed"), frozen_id=c.pad_token_id)
        if c.type_vocab_size:
            self.token_type = c.embed(c.type_vocab_size, (None, "embed"))
            self.word_type_sum = Site(c.quant)
        self.position = c.embed(c.max_position_embeddings + c.position_offset, (None, "embed"))
        if c.num_registers:
            self.registers = Registers(c)
        self.position_sum = Site(c.quant)
        self.layer_norm = c.layer_norm()
        self.dropout = Dropout(c.hidden_dropout)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None,
        token_type_ids_BxT: jax.Array | None,
        *,
        train: bool,
    ) -> Tensor:
        """Returns [B, R + T, D]."""
        check_positions(input_ids_BxT.shape[1], self.config.max_position_embeddings)
        x: Tensor = self.word(input_ids_BxT)
        if self.config.type_vocab_size:
            types: jax.Array | slice = slice(1)
            if token_type_ids_BxT is not None:
                types = token_type_ids_BxT
            x = self.word_type_sum(values(x) + beside(self.token_type(types), x))
        position = self.position(self._rows(input_ids_BxT.shape[1], attention_mask_BxT))
        x = values(x) + beside(position, x)
        x = self.position_sum(self.registers(x) if self.config.num_registers else x)
        return self.dropout(self.layer_norm(x), deterministic=not train)

    def _rows(self, length: int, attention_mask_BxT: jax.Array | None) -> jax.Array | slice:
        """Rows of the position table: those in order, or, as RoBERTa does, of visible tokens."""
        offset = self.config.position_offset
        if not offset or attention_mask_BxT is None:
            return slice(offset, offset + length)
        return positions(attention_mask_BxT) + offset


class BertLayer(nn.Module):
    """Attention and FFN, each followed by dropout, residual sum and LayerNorm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxTxD: Tensor, mask: Mask | None, *, train: bool) -> Tensor:
        """Returns [B, T, D]."""
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


class Bert(nn.Module):
    """The whole model; `loss` is what training and evaluation call."""

    config: BertConfig
    has_final_layer_norm = False

    @property
    def metric(self) -> Metric:
        """What it is judged by."""
        return {"masked_lm": PERPLEXITY, "classifier": TOP1}.get(self.config.head, FIDELITY)

    def setup(self):
        """Declares embeddings, layers and head."""
        c = self.config
        self.embeddings = BertEmbeddings(c)
        self.layers = [BertLayer(c, name=f"layer_{i}") for i in range(c.num_layers)]
        if c.head == "masked_lm":
            self.mlm_head = MlmHead(c)
        if c.head in ("classifier", "pooler"):
            pooler = {"activation": c.pooler_activation, "quant": c.head_quant}
            self.pooler = c.dense(c.hidden_size, ("embed", "mlp"), **pooler)
        if c.head == "classifier":
            self.classifier_dropout = Dropout(c.hidden_dropout)
            self.classifier = c.dense(c.num_classes, ("mlp", None), quant=c.head_quant)

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
        x = self.embeddings(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, train=train)
        visible_BxS = shown(attention_mask_BxT, self.config.num_registers)
        mask = None if visible_BxS is None else Mask(visible_BxS)
        x = run_layers(self.config, self.layers, x, mask, train=train)
        return behind(x, self.config.num_registers)

    def _encode_batch(self, batch: dict[str, jax.Array], train: bool) -> Tensor:
        mask, types = batch.get("attention_mask"), batch.get("token_type_ids")
        return self._encode(batch["input_ids"], mask, types, train)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        train: bool = False,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, T, V], [B, num_classes] of a classifier.

        Of an encoder alone, the last hidden states [B, T, D].

        Args:
          input_ids_BxT: token ids; T at most `max_position_embeddings`.
          attention_mask_BxT: 1 for a token, 0 for padding; None shows every token.
          token_type_ids_BxT: segment ids; None means all 0.
          train: True applies dropout and needs a "dropout" rng.
          deterministic: the opposite of `train`, as Flax's modules take it; None leaves it to that.
        """
        train = is_training(train, deterministic)
        x = self._encode(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, train)
        if self.metric is FIDELITY:
            return values(x).astype(jnp.float32)
        return self.predict(x, train=train)

    def predict(self, x_BxTxD: Tensor, *, train: bool = False) -> jax.Array:
        """Hidden states -> float32 logits: [B, T, V] of the tokens, or [B, num_classes]."""
        if self.config.head == "masked_lm":
            return self.mlm_head(x_BxTxD, self.embeddings.word)
        pooled_BxD = self.classifier_dropout(self._pool(x_BxTxD), deterministic=not train)
        return values(self.classifier(pooled_BxD)).astype(jnp.float32)

    def _finish(self, x_BxTxD: Tensor) -> jax.Array:
        """What stands behind the layers, of any head."""
        if self.config.head == "pooler":
            return self.pool(x_BxTxD)
        return values(x_BxTxD) if self.config.head == "none" else self.predict(x_BxTxD)

    def pool(self, x_BxTxD: Tensor) -> jax.Array:
        """Hidden states -> the pooler's output [B, D], of a model that has one."""
        return values(self._pool(x_BxTxD))

    def _pool(self, x_BxTxD: Tensor) -> Tensor:
        first_BxD = x_BxTxD[:, 0]
        return self.pooler(values(first_BxD) if self.config.head_quant is None else first_BxD)

    def features(self, batch: dict[str, jax.Array], *, train: bool = False) -> Features:
        """Returns the last hidden states of a batch, and its sequences' embeddings.

        Args:
          batch: as in `loss`; labels may lack.
          train: as in `__call__`.
        """
        hidden_BxTxD = values(self._encode_batch(batch, train))
        visible_BxT = batch.get("attention_mask", jnp.ones_like(batch["input_ids"]))
        return pooled(hidden_BxTxD, visible_BxT, self.config.pooling)

    def loss(self, batch: dict[str, jax.Array], *, train: bool = False) -> Scores:
        """Scores the labelled tokens, or the class of each sequence; an encoder alone, nothing.

        Args:
          batch: `input_ids` [B, T] and `labels`, [B, T] (-100: no label) or classes [B],
            optionally `attention_mask` and `token_type_ids`.
          train: as in `__call__`.
        """
        c, x_BxTxD = self.config, self._encode_batch(batch, train)
        if self.metric is FIDELITY or "labels" not in batch:
            self._finish(x_BxTxD)  # so that it is initialised and calibrated
            return no_scores(x_BxTxD.shape[0])
        labels = batch["labels"]
        if c.head == "classifier":
            targets_BxC = smooth_targets(labels, c.num_classes, 0.0)
            return class_scores(self.predict(x_BxTxD, train=train), targets_BxC, labels)
        if c.max_predictions:
            x_BxTxD, labels = select_labelled(x_BxTxD, labels, c.max_predictions)
        return self.mlm_head.scores(x_BxTxD, self.embeddings.word, labels)

    def example_batch(self) -> dict[str, jax.Array]:
        """The smallest batch that the model can be initialised with."""
        ids = jnp.zeros((1, 1), jnp.int32)
        classes = self.config.head == "classifier"
        return {"input_ids": ids, "labels": jnp.zeros((1,), jnp.int32) if classes else ids}
