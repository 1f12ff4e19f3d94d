"""The masked-LM head of BERT and its kin."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.models.losses import Scores, chunked_scores, token_scores
from quantizable_flax.models.transformer import gelu
from quantizable_flax.nn.layers import Embed, partitioned_param
from quantizable_flax.nn.partition import platform
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.tensor import Tensor, beside, values


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm before the tied decoder; in floating point in all that was published.

    `quant.coverage=all` quantizes it like every other layer, which is an extension of ours.
    """

    config: Any  # a BertConfig

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
        logits = _with_bias(word.decoder()(self._transform(x)), self.bias)
        return values(self.logits(logits))

    def scores(self, x_BxTxD: Tensor, word: Embed, labels_BxT: jax.Array) -> Scores:
        """Scores the labels, the logits of so many positions at a time as configured."""
        rounded = self.logits.as_function()
        if rounded is None:
            return token_scores(self(x_BxTxD, word), labels_BxT)
        attend, bias_V = word.decoder(), self.bias
        return chunked_scores(
            lambda x: values(rounded(_with_bias(attend(x), bias_V))),
            self._transform(x_BxTxD),
            labels_BxT,
            self.config.loss_chunk,
        )

    def _transform(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.dense(x if self.config.head_quant is not None else values(x)))


def _with_bias(logits: jax.Array, bias_V: jax.Array) -> jax.Array:
    """[..., V] + [V]; XLA:CPU sums rows of 30000 columns 20 to 60 times as slowly as it multiplies
    them by ones, so there that is the gradient of the bias."""
    return (_summed_by_product if platform() == "cpu" else jnp.add)(logits, beside(bias_V, logits))


@jax.custom_vjp
def _summed_by_product(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """logits + bias, whose leading axes have length 1."""
    return logits + bias


def _backward(_: None, d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    leading = d_logits.shape[:-1]
    ones, highest = jnp.ones(leading, d_logits.dtype), jax.lax.Precision.HIGHEST
    d_bias_V = jnp.tensordot(ones, d_logits, axes=len(leading), precision=highest)
    return d_logits, beside(d_bias_V, d_logits)


_summed_by_product.defvjp(lambda logits, bias: (logits + bias, None), _backward)
