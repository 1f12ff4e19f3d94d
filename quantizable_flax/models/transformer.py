"""What the families share: sizes, and layers that carry a model's dtype and quantization."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_at_least, check_choice
from quantizable_flax.models.structure import Fold, OutlierSites
from quantizable_flax.models.weights import WeightNames
from quantizable_flax.nn.attention import MultiHeadAttention
from quantizable_flax.nn.fused import check_kernel
from quantizable_flax.nn.gate import GateConfig
from quantizable_flax.nn.layers import Dense, Dropout, Embed
from quantizable_flax.nn.norm import NORMS, Norm
from quantizable_flax.nn.partition import constrain
from quantizable_flax.nn.softmax_config import VANILLA, SoftmaxFn
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.tensor import Tensor, beside, values

# What a layer keeps for its backward pass.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
gelu = functools.partial(nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of every family; the defaults are a base model. Rates in [0, 1).

    Attributes:
      data: of the family, what it learns from: "masked text", "causal text" or "images".
      weight_names: of the family, what its weights are called in other checkpoints, by source.
      causal: of the family, whether a token may see no later one.
      coverage: of the family, the published `quant.coverage`.
      hidden_size: width of the layers' input and output, a multiple of num_heads.
      num_layers: layers of attention and a feed-forward network.
      num_heads: attention heads of a layer.
      intermediate_size: width inside a feed-forward network.
      norm: what normalises activations: "layer_norm"; "rms_norm", without a mean and a bias;
        "rms_norm_single", as that, with one learned scale for all channels.
      layer_norm_eps: added to the variance, or mean square, in every norm.
      initializer_range: standard deviation of the initial weights.
      hidden_dropout: rate behind embeddings and blocks.
      attention_dropout: rate of the attention probabilities.
      dtype: what is computed in, "float32" or "bfloat16"; parameters stay float32.
      remat: what the backward pass computes again instead of keeping it: "none"; "dots", all but
        the products with weights; "full", whole layers.
      loss_chunk: positions of each sequence whose logits exist at a time, on a CPU at most; 0 for
        all.
      attention_kernel: what computes attention where it is not measured or quantized: "auto", by
        the platform; "unfused"; "blockwise", plain XLA in blocks of queries; "cudnn", "gpu" or
        "tpu".
      qk_norm: whether each head's queries and keys are RMS-normalised before the scores, with a
        learned scale for each element of a head, as in Qwen3.
    """

    data: ClassVar[str]
    weight_names: ClassVar[tuple[WeightNames, ...]] = ()
    causal: ClassVar[bool] = False
    coverage: ClassVar[str] = "fp32_head"

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm: str = "layer_norm"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    loss_chunk: int = 128
    attention_kernel: str = "auto"
    qk_norm: bool = False
    softmax: SoftmaxFn = VANILLA
    gate: GateConfig | None = None
    quant: QuantSpec | None = None

    def __post_init__(self):
        """Raises UserError for a size below 1, a rate outside [0, 1) or a gate that looks ahead."""
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            check_at_least(1, f"model.{name}", getattr(self, name))
        if self.hidden_size % self.num_heads:
            raise UserError(
                "model.num_heads must divide model.hidden_size, found "
                f"{self.num_heads} heads and hidden size {self.hidden_size}."
            )
        if self.causal and self.gate is not None and self.gate.pooled and self.gate.masked:
            raise UserError(
                "a causal model cannot have model.attention.gate_pooling=visible, whose average "
                "over the sequence shows each token all later ones: choose gate_pooling=none, or "
                "gate_pooling=all for the published variant that looks ahead."
            )
        check_choice("model.norm", self.norm, NORMS)
        check_choice("train.remat", self.remat, REMAT)
        check_kernel(self.attention_kernel)
        if self.loss_chunk < 0:
            raise UserError(f"train.loss_chunk must not be negative, found {self.loss_chunk}.")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"model.{name} must be in [0, 1), found {getattr(self, name)}.")
        if not self.initializer_range > 0.0:
            raise UserError(
                f"model.initializer_range must be above 0, found {self.initializer_range}."
            )

    @property
    def outlier_sites(self) -> OutlierSites:
        """Where the family's published outlier metrics are taken."""
        raise NotImplementedError

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The LayerNorms that SmoothQuant may fold, and what reads them."""
        raise NotImplementedError

    def length(self, data: Mapping[str, Any]) -> int:
        """Tokens that the layers see of an example of `config.data`."""
        return data["seq_len"]

    def embedding_products(self, tokens: int) -> int:
        """Multiply-adds before the layers, for `models/flops.py`; lookups are none."""
        del tokens
        return 0

    def head_products(self, tokens: int) -> int:
        """Multiply-adds behind the layers."""
        raise NotImplementedError

    @property
    def kernel_init(self):
        """N(0, initializer_range) for every weight matrix and table."""
        return nn.initializers.normal(self.initializer_range)

    @property
    def head_quant(self) -> QuantSpec | None:
        """The spec of the head: None where `quant.coverage` keeps it in floating point."""
        return self.quant if self.quant is not None and self.quant.head else None

    def dense(self, features: int, axes: tuple[str | None, str | None], **options: Any) -> Dense:
        """A Dense layer with this configuration's initialiser, dtype and quantization."""
        shared = {"kernel_init": self.kernel_init, "dtype": self.dtype, "quant": self.quant}
        return Dense(features, axes=axes, **{**shared, **options})

    def layer_norm(self, *, final: bool = False, **options: Any) -> Norm:
        """A norm of this configuration's kind, with its epsilon, dtype and quantization."""
        quant = self.quant and self.quant.for_layer_norm(final=final)
        shared = {"epsilon": self.layer_norm_eps, "dtype": self.dtype, "quant": quant}
        return Norm(self.norm, **{**shared, **options})

    def embed(self, rows: int, axes: tuple[str | None, str], **options: Any) -> Embed:
        """A table of this configuration's width (or `features`), initialiser and quantization."""
        return Embed(
            rows,
            options.pop("features", self.hidden_size),
            axes=axes,
            embedding_init=self.kernel_init,
            dtype=self.dtype,
            quant=self.quant,
            **options,
        )

    def tied_embed(self, rows: int, axes: tuple[str | None, str], **options: Any) -> Embed:
        """As `embed`, for the table that the head multiplies by too."""
        return self.embed(rows, axes, head="quantized" if self.head_quant else "float", **options)

    def attention(self, **options: Any) -> MultiHeadAttention:
        """The attention layer of this configuration."""
        return MultiHeadAttention(
            self.num_heads,
            softmax=self.softmax,
            gate=self.gate,
            qk_norm=self.qk_norm,
            dropout_rate=self.attention_dropout,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            quant=self.quant,
            kernel=self.attention_kernel,
            **options,
        )


def run_layers(
    config: TransformerConfig, layers: Sequence[nn.Module], x: Tensor, *args: Any, **options: Any
) -> Tensor:
    """Calls `layer(x, *args, **options)` one after the other, rematerialised as configured."""

    def call(layer: nn.Module, x: Tensor, *args: Any) -> Tensor:
        return layer(x, *args, **options)

    if config.remat != "none":
        call = nn.remat(call, policy=REMAT[config.remat])
    x = constrain(x, "batch", "length", None)
    for layer in layers:
        x = call(layer, x, *args)
    return x


class ResidualScale(nn.Module):
    """`x * scale` where the params have a `scale` [D], else x without an operation.

    Only `ptq.smoothquant` puts one there, behind a LayerNorm that it divided by it; `init`
    never does. The factor is never quantized.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        if not self.has_variable("params", "scale"):
            return x
        return x * beside(self.get_variable("params", "scale").astype(x.dtype), x)


def residual(config: TransformerConfig, block: str, x: Tensor, y: Tensor, *, train: bool) -> Tensor:
    """`x + dropout(y)` through the site `{block}_residual`; called by a layer's compact method."""
    y = Dropout(config.hidden_dropout)(y, deterministic=not train)
    x = ResidualScale(name=f"{block}_residual_scale")(values(x))
    x = constrain(x + values(y), "batch", "length", None)
    return Site(config.quant, name=f"{block}_residual")(x)


def check_positions(length: int, known: int) -> None:
    """Raises UserError for more tokens than positions: lookups would repeat the last one."""
    if length > known:
        raise UserError(f"the model has {known} positions, found sequences of {length} tokens.")


def positions(attention_mask_BxT: jax.Array) -> jax.Array:
    """Position of each token among the visible ones, from 0; -1 for padding."""
    mask_BxT = attention_mask_BxT.astype(jnp.int32)
    return jnp.cumsum(mask_BxT, axis=1) * mask_BxT - 1
