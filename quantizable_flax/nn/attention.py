"""Multi-head attention as scores -> probabilities -> context -> gate, each step replaceable."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.nn.fused import choose, fused
from quantizable_flax.nn.gate import Gate, GateConfig
from quantizable_flax.nn.head_norm import HeadNorm
from quantizable_flax.nn.layers import Dense, is_training, partitioned_param
from quantizable_flax.nn.mask import Mask, dense
from quantizable_flax.nn.partition import constrain
from quantizable_flax.nn.softmax_config import VANILLA, SoftmaxFn
from quantizable_flax.quantization.sites import Site, record
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.statistics import zero_share
from quantizable_flax.quantization.tensor import (
    Quantized,
    Tensor,
    apart,
    product,
    split_last,
    values,
)


class MultiHeadAttention(nn.Module):
    """Self-attention with a free choice of softmax and gate.

    The order is the paper's: scores, scale, mask, softmax (float32), stretch and clip, dropout,
    times V, gate, output projection.

    Attributes:
      num_heads: H; must divide the width of x.
      softmax: a `SoftmaxConfig`, or any function `(scores, mask) -> probs`.
      gate: which gate multiplies the context, None for no gate.
      dropout_rate: of the probabilities, in [0, 1).
      kernel_init: initialiser of the four projections.
      dtype: compute dtype; softmax and gate are float32 whatever it is.
      quant: how weights and activations are quantized.
      context_before_gate: put the context's grid before the gate, as published for OPT; a second
        one behind the gate follows unless `quant.gated_context` is off.
      output_projection: False returns the merged context, as the original's inner module does.
      kernel: which program computes scores to context where nothing is measured or quantized, one
        of `nn.fused.KERNELS`.
      qk_norm: whether each head's queries and keys are normalised, see `HeadNorm`.
    """

    num_heads: int
    softmax: SoftmaxFn = VANILLA
    gate: GateConfig | None = None
    dropout_rate: float = 0.0
    kernel_init: Callable = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None
    context_before_gate: bool = False
    output_projection: bool = True
    kernel: str = "auto"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Tensor,
        mask: jax.Array | Mask | None = None,
        *,
        train: bool = False,
        deterministic: bool | None = None,
        cache_at: jax.Array | None = None,
    ) -> Tensor:
        """Returns [B, T, D], on a grid if `quant` is given.

        Args:
          x_BxTxD: the layer's input.
          mask: a `Mask`, which the fused programs read, or an array that broadcasts to
            [B, H, T, keys], True where a key is visible; with a gate per head, one for all
            queries, [B, 1, 1, keys].
          train: applies dropout, and needs a "dropout" rng.
          deterministic: the opposite of `train`, as Flax's modules take it; None leaves it to that.
          cache_at: write keys and values into the mutable collection `cache` (arrays `key` and
            `value`, [B, S, H, K]) from this place on, and attend to all S of them.

        Raises:
          UserError: heads that do not divide D, or a gate that averages over tokens together with
            a mask that differs from query to query or with a cache.
        """
        train = is_training(train, deterministic)
        width = x_BxTxD.shape[-1]
        if width % self.num_heads:
            raise UserError(
                f"the number of heads must divide the hidden size, found {self.num_heads} heads "
                f"and hidden size {width}."
            )
        if cache_at is not None and self.gate is not None and self.gate.pooled:
            raise UserError(
                "attention with cache_at needs a gate that sees no other token, found "
                f"gate_pooling={self.gate.pooling}: choose gate_pooling=none."
            )
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (
            self._heads(x_BxTxD, name) for name in ("query", "key", "value")
        )
        own_BxTxHxK = v_BxTxHxK
        if cache_at is not None:
            k_BxTxHxK = self._cached("key", k_BxTxHxK, cache_at)
            v_BxTxHxK = self._cached("value", v_BxTxHxK, cache_at)
        sites = (Site(self.quant, name="scores"), Site(self.quant, name="probs"))
        path = "unfused"
        if cache_at is None and all(site.passes() for site in sites):
            path = choose(self.kernel, self.softmax, mask, q_BxTxHxK, k_BxTxHxK, v_BxTxHxK)
        attend = functools.partial(self._fused, path)
        if path == "unfused":
            attend = functools.partial(self._unfused, sites)
        rate = self.dropout_rate if train else 0.0
        context_BxTxHxK = attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, mask, rate)
        mask = dense(mask, x_BxTxD.shape[1], k_BxTxHxK.shape[1])
        context_BxTxD = self._gated(context_BxTxHxK, x_BxTxD, mask, own_BxTxHxK)
        if not self.output_projection:
            return context_BxTxD
        return self._dense(width, ("heads", "embed"), "output")(context_BxTxD)

    def _unfused(self, sites, q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, rate: float) -> jax.Array:
        """The context [B, T, H, K] by way of all scores and probabilities, through their sites."""
        scores_site, probs_site = sites
        mask = dense(mask, q_BxTxHxK.shape[1], k_BxSxHxK.shape[1])
        scores_BxHxTxS = attention_scores(q_BxTxHxK, k_BxSxHxK)
        scores_BxHxTxS = values(scores_site(scores_BxHxTxS, mask))
        if self.quant is not None:
            scores_BxHxTxS = apart(scores_BxHxTxS)
        sink_H = self._sink()
        # A softmax that is any function knows of no sinks.
        exact_BxHxTxS = self.softmax(scores_BxHxTxS, mask, *(() if sink_H is None else (sink_H,)))
        if self.quant is not None:
            exact_BxHxTxS = apart(exact_BxHxTxS)
        record(self, "zero_share", lambda: zero_share(exact_BxHxTxS, mask))
        probs_BxHxTxS = probs_site(exact_BxHxTxS)
        if rate:
            probs_BxHxTxS = nn.Dropout(rate, deterministic=False)(values(probs_BxHxTxS))
        return attention_context(probs_BxHxTxS, v_BxSxHxK)

    def _fused(self, path, q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, rate: float) -> jax.Array:
        """The same context by one program, its scores in no memory."""
        return fused(
            path,
            self.softmax,
            q_BxTxHxK,
            k_BxSxHxK,
            v_BxSxHxK,
            mask,
            sink_H=self._sink(),
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
        )

    def _sink(self) -> jax.Array | None:
        """The logits of learned sinks [H], None for a softmax without them."""
        if getattr(self.softmax, "sink", "none") != "learned":
            return None
        zeros = nn.initializers.zeros
        return partitioned_param(self, "sink", zeros, (self.num_heads,), ("heads",))

    def _gated(
        self,
        context_BxTxHxK: jax.Array,
        x_BxTxD: Tensor,
        mask: jax.Array | None,
        v_BxTxHxK: Tensor,
    ) -> Tensor:
        """The context times the gate, heads merged, on the grids of the scheme: [B, T, D]."""
        merged = x_BxTxD.shape
        if self.gate is None:
            return Site(self.quant, name="context")(context_BxTxHxK.reshape(merged))
        split = context_BxTxHxK.shape
        if self.context_before_gate:
            context_BxTxD = Site(self.quant, name="context")(context_BxTxHxK.reshape(merged))
            context_BxTxHxK = values(context_BxTxD).reshape(split)
        read = values(v_BxTxHxK) if self.gate.kind == "value" else None
        gate = Gate(self.gate, self.num_heads, name="gate")
        gate_BxTxHxN = gate(values(x_BxTxD), mask, read)
        gated_BxTxHxK = context_BxTxHxK * gate_BxTxHxN.astype(context_BxTxHxK.dtype)
        if not self.context_before_gate:
            return Site(self.quant, name="context")(gated_BxTxHxK.reshape(merged))
        quant = self.quant if self.quant and self.quant.gated_context else None
        return Site(quant, name="gated_context")(gated_BxTxHxK.reshape(merged))

    def _cached(self, name: str, new_BxTxHxK: Tensor, start: jax.Array) -> Tensor:
        """Writes into the cache, returns all of it, [B, S, H, K].

        Codes on one grid for all tokens are kept as codes, anything else as values.
        """
        if not self.has_variable("cache", name):
            raise UserError(
                "attention with cache_at needs the collection `cache`, found none: allocate it "
                "with the model's empty_cache."
            )
        if isinstance(new_BxTxHxK, Quantized) and not jnp.ndim(new_BxTxHxK.scale):
            return new_BxTxHxK.with_codes(self._write(name, new_BxTxHxK.codes, start))
        return self._write(name, values(new_BxTxHxK), start)

    def _write(self, name: str, new_BxTxHxK: jax.Array, start: jax.Array) -> jax.Array:
        cache_BxSxHxK: jax.Array = self.get_variable("cache", name)
        cache_BxSxHxK = jax.lax.dynamic_update_slice_in_dim(
            cache_BxSxHxK, new_BxTxHxK.astype(cache_BxSxHxK.dtype), start, axis=1
        )
        self.put_variable("cache", name, cache_BxSxHxK)
        return cache_BxSxHxK.astype(new_BxTxHxK.dtype)

    def _heads(self, x_BxTxD: Tensor, name: str) -> Tensor:
        norm = None
        if self.qk_norm and name != "value":
            scale_quant = self.quant and self.quant.for_layer_norm()
            norm = HeadNorm(self.num_heads, quant=scale_quant, name=f"{name}_norm")
        y_BxTxD = self._dense(x_BxTxD.shape[-1], ("embed", "heads"), name, norm)(x_BxTxD)
        length = "length" if name == "query" else None  # every query sees all keys
        return constrain(split_last(y_BxTxD, self.num_heads), "batch", length, "heads", None)

    def _dense(
        self, features: int, axes: tuple[str, str], name: str, activation: Callable | None = None
    ) -> Dense:
        return Dense(
            features,
            axes=axes,
            activation=activation,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            quant=self.quant,
            name=name,
        )


def attention_scores(
    q_BxTxHxK: Tensor, k_BxSxHxK: Tensor, precision: Any = None, scale: float | None = None
) -> jax.Array:
    """`q . k / sqrt(d)`, or `scale q . k`, in float32: [B, H, T, S]; any batch axes."""
    scores = product("...THK,...SHK->...HTS", q_BxTxHxK, k_BxSxHxK, precision=precision)
    return scores / math.sqrt(q_BxTxHxK.shape[-1]) if scale is None else scores * scale


def attention_context(probs_BxHxTxS: Tensor, v_BxSxHxK: Tensor, precision: Any = None) -> jax.Array:
    """Sum of the values weighted by the probabilities, in v's dtype: [B, T, H, K]."""
    context = product(
        "...HTS,...SHK->...THK",
        probs_BxHxTxS,
        v_BxSxHxK,
        dtype=v_BxSxHxK.dtype,
        precision=precision,
    )
    return context.astype(v_BxSxHxK.dtype)
