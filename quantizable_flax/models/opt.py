"""OPT for causal language modelling: pre-LN, ReLU, tied head without bias (arXiv 2205.01068)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.features import Features, pooled
from quantizable_flax.models.losses import IGNORED, Scores, chunked_scores, token_scores
from quantizable_flax.models.metric import PERPLEXITY
from quantizable_flax.models.opt_config import OptConfig
from quantizable_flax.models.registers import Registers, behind, shown
from quantizable_flax.models.transformer import (
    check_positions,
    positions,
    residual,
    run_layers,
)
from quantizable_flax.nn.layers import is_training
from quantizable_flax.nn.mask import Mask
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.spec import INT8_BITS
from quantizable_flax.quantization.tensor import Tensor, beside, values

POSITION_OFFSET = 2  # rows 0 and 1 of the position table: OPT counts from 2, padding has row 1


class OptEmbeddings(nn.Module):
    """Word embeddings, projected where their width differs, plus learned positions."""

    config: OptConfig

    def setup(self):
        """Declares the tables; `word` is shared with the head."""
        c = self.config
        self.word = c.tied_embed(
            c.vocab_size,
            ("vocab", "embed"),
            features=c.word_size,
            frozen_id=c.pad_token_id,
        )
        self.position = c.embed(c.max_position_embeddings + POSITION_OFFSET, (None, "embed"))
        if c.projects:
            self.project_in = c.dense(c.hidden_size, (None, "embed"), use_bias=False)
        if c.num_registers:
            self.registers = Registers(c)
        self.sum = Site(c.quant)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        positions_BxT: jax.Array | None,
        *,
        registers: bool = False,
    ) -> Tensor:
        """Returns [B, T, D], or [B, R + T, D] with registers before the tokens.

        Positions count from 0, -1 is padding, None is 0, 1, ... in order.
        """
        word, projects = self.word, self.config.projects
        x = values(self.project_in(word.rows(input_ids_BxT))) if projects else word(input_ids_BxT)
        if positions_BxT is None:
            rows: jax.Array | slice = slice(
                POSITION_OFFSET, POSITION_OFFSET + input_ids_BxT.shape[1]
            )
        else:
            rows = positions_BxT + POSITION_OFFSET
        x = x + beside(self.position(rows), x)
        return self.sum(self.registers(x) if registers and self.config.num_registers else x)


class OptLayer(nn.Module):
    """Attention and FFN with residual sums, LayerNorm before (or behind) each."""

    config: OptConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Tensor,
        mask: jax.Array | Mask,
        *,
        train: bool,
        cache_at: jax.Array | None = None,
    ) -> Tensor:
        """Returns [B, T, D]; mask broadcasts to [B, H, T, keys], `cache_at` as in attention."""
        c = self.config
        attention = c.attention(context_before_gate=True, name="attention")
        norm = c.layer_norm(name="attention_layer_norm")
        y = norm(x_BxTxD) if c.pre_layer_norm else x_BxTxD
        y = attention(y, mask, train=train, cache_at=cache_at)
        x_BxTxD = residual(c, "attention", x_BxTxD, y, train=train)
        x_BxTxD = x_BxTxD if c.pre_layer_norm else norm(x_BxTxD)

        norm = c.layer_norm(name="ffn_layer_norm")
        y = norm(x_BxTxD) if c.pre_layer_norm else x_BxTxD
        y = c.dense(c.intermediate_size, ("embed", "mlp"), activation=nn.relu, name="ffn_in")(y)
        y = c.dense(c.hidden_size, ("mlp", "embed"), name="ffn_out")(y)
        x_BxTxD = residual(c, "ffn", x_BxTxD, y, train=train)
        return x_BxTxD if c.pre_layer_norm else norm(x_BxTxD)


class OptForCausalLM(nn.Module):
    """The whole model; `loss` is what training and evaluation call."""

    config: OptConfig
    metric = PERPLEXITY

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a LayerNorm stands before the head."""
        return self.config.pre_layer_norm

    def setup(self):
        """Declares embeddings, layers and what follows them."""
        c = self.config
        self.embeddings = OptEmbeddings(c)
        self.layers = [OptLayer(c, name=f"layer_{i}") for i in range(c.num_layers)]
        if c.pre_layer_norm:
            self.final_layer_norm = c.layer_norm(final=True)
        if c.projects:
            self.project_out = c.dense(c.word_size, ("embed", None), use_bias=False)
        self.logits = Site(c.head_quant)

    def embed(
        self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None = None
    ) -> Tensor:
        """Returns the embeddings [B, R + T, D]; positions count the tokens that the mask shows."""
        check_positions(input_ids_BxT.shape[1], self.config.max_position_embeddings)
        known = None if attention_mask_BxT is None else positions(attention_mask_BxT)
        return self.embeddings(input_ids_BxT, known, registers=True)

    def encode(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the hidden states before the head, [B, T, embed_size or D]."""
        return values(self._encode(input_ids_BxT, attention_mask_BxT, train))

    def _encode(
        self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None, train: bool
    ) -> Tensor:
        mask = Mask(shown(attention_mask_BxT, self.config.num_registers), causal=True)
        x = self.embed(input_ids_BxT, attention_mask_BxT)
        x = run_layers(self.config, self.layers, x, mask, train=train)
        return self._finish(behind(x, self.config.num_registers))

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        *,
        train: bool = False,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, T, V]; those at t are for the token at t + 1.

        Args:
          input_ids_BxT: token ids; T at most `max_position_embeddings`.
          attention_mask_BxT: 1 for a token, 0 for padding on either side; None shows all.
          train: True applies dropout and needs a "dropout" rng.
          deterministic: the opposite of `train`, as Flax's modules take it; None leaves it to that.
        """
        train = is_training(train, deterministic)
        return self.head(self._encode(input_ids_BxT, attention_mask_BxT, train))

    def head(self, x: Tensor) -> jax.Array:
        """Hidden states before the head -> float32 logits [..., V]."""
        return values(self.logits(self.embeddings.word.decoder()(x)))

    def predict(self, x_BxTxD: Tensor, *, train: bool = False) -> jax.Array:
        """Hidden states before the head -> float32 logits [B, T, V]."""
        del train
        return self.head(x_BxTxD)

    def features(self, batch: dict[str, jax.Array], *, train: bool = False) -> Features:
        """Returns the hidden states before the head, and their mean over each sequence's tokens."""
        mask_BxT = batch.get("attention_mask")
        hidden_BxTxD = values(self._encode(batch["input_ids"], mask_BxT, train))
        visible_BxT = jnp.ones_like(batch["input_ids"]) if mask_BxT is None else mask_BxT
        return pooled(hidden_BxTxD, visible_BxT, "mean")

    def loss(self, batch: dict[str, jax.Array], *, train: bool = False) -> Scores:
        """Scores each token's prediction of the next one.

        Args:
          batch: `input_ids` and `labels` [B, T], not shifted (-100: no label), optionally
            `attention_mask`.
          train: as in `__call__`.
        """
        x_BxTxD = self._encode(batch["input_ids"], batch.get("attention_mask"), train)
        # Shifting the labels instead of the logits copies no [B, T, V] array.
        labels_BxT = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        rounded, attend = self.logits.as_function(), self.embeddings.word.decoder()
        if rounded is None:
            return token_scores(self.head(x_BxTxD), labels_BxT)
        return chunked_scores(
            lambda x: values(rounded(attend(x))), x_BxTxD, labels_BxT, self.config.loss_chunk
        )

    def extend(
        self,
        input_ids_BxT: jax.Array,
        positions_BxT: jax.Array,
        visible_BxS: jax.Array,
        start: jax.Array,
        *,
        first: bool = False,
    ) -> jax.Array:
        """Runs T further tokens at places start.. of the cache; logits of the last, [B, V].

        Registers have places of their own before all tokens', which the first call fills.

        Args:
          input_ids_BxT: the tokens; the collection `cache` is from `empty_cache` and mutable.
          positions_BxT: their positions from 0, -1 for padding.
          visible_BxS: True for places of the cache that hold a token once these are written.
          start: int32 scalar.
          first: whether these are the first tokens, at start 0.
        """
        registers = self.config.num_registers
        x = self.embeddings(input_ids_BxT, positions_BxT, registers=first)
        at = start if first else start + registers
        visible_BxS = jnp.pad(visible_BxS, ((0, 0), (registers, 0)), constant_values=1)
        keys_S = jnp.arange(visible_BxS.shape[1], dtype=jnp.int32)
        places_T = at + jnp.arange(x.shape[1], dtype=jnp.int32)
        mask_TxS = keys_S[None, :] <= places_T[:, None]
        mask = mask_TxS[None, None] & visible_BxS.astype(bool)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask, train=False, cache_at=at)
        return self.head(self._finish(x[:, -1:]))[:, 0]

    def empty_cache(self, batch_size: int, length: int) -> dict:
        """The collection `cache` for `extend`: zeros for `length` tokens of each sequence."""
        c = self.config
        check_positions(length, c.max_position_embeddings)
        shape = (batch_size, c.num_registers + length, c.num_heads, c.hidden_size // c.num_heads)
        return {
            f"layer_{i}": {
                "attention": {
                    name: jnp.zeros(shape, self._cache_dtype(f"layer_{i}/attention/{name}/output"))
                    for name in ("key", "value")
                }
            }
            for i in range(c.num_layers)
        }

    def _cache_dtype(self, site: str) -> jnp.dtype:
        """int8 where the site's codes are that, float32 where they are wide, else as computed."""
        quant = self.config.quant
        if quant is not None and quant.serves_int8(site):
            return jnp.int8
        wide = quant is not None and (quant.bits(site) or 0) > INT8_BITS
        return jnp.float32 if wide else self.config.dtype

    def example_batch(self) -> dict[str, jax.Array]:
        """The smallest batch that the model can be initialised with."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": ids, "labels": ids}

    def _finish(self, x: Tensor) -> Tensor:
        if self.config.pre_layer_norm:
            x = self.final_layer_norm(x)
        return self.project_out(x) if self.config.projects else x
