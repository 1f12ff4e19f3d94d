"""Dense, Embed and LayerNorm whose weights and outputs pass through the tap."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.quantization.sites import Site, WeightSite
from quantizable_flax.quantization.spec import QuantSpec

Axes = tuple[str | None, ...]


def partitioned_param(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: Axes
) -> jax.Array:
    """Declares a float32 parameter whose axes carry logical names for sharding."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)  # type: ignore[return-value]


class Dense(nn.Module):
    """`activation(x @ kernel + bias)`; the activation is fused, so only its result is quantized.

    Attributes:
      features: width of the output.
      axes: logical names of the kernel's (input, output) axes, for sharding.
      kernel_init: initialiser of the kernel; the bias starts at 0.
      activation: elementwise function, or None.
      use_bias: whether there is a bias.
      dtype: compute dtype; parameters stay float32.
      quant: how kernel and output are quantized.
    """

    features: int
    axes: Axes = (None, None)
    kernel_init: Callable = nn.initializers.normal(0.02)
    activation: Callable[[jax.Array], jax.Array] | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., features]."""
        kernel = partitioned_param(
            self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes
        )
        kernel = WeightSite(self.quant, name="weight")(kernel)
        # As rows: XLA:CPU gives the backward pass of a product of [B, T, D] operands transposed,
        # strided fusions, and took nine times as long for the FFN of a small ViT.
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = partitioned_param(
                self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:]
            )
            y = y + bias.astype(self.dtype)
        if self.activation is not None:
            y = self.activation(y)
        return Site(self.quant, name="output")(y.reshape(*x.shape[:-1], self.features))


class Embed(nn.Module):
    """A lookup table; `attend` multiplies by its transpose.

    Attributes:
      num_embeddings: rows of the table.
      features: width of a row.
      axes: logical names of the table's axes.
      embedding_init: initialiser.
      frozen_id: a row that the lookup gives no gradient (the padding token), or None.
      dtype: compute dtype.
      quant: how the table is quantized.
    """

    num_embeddings: int
    features: int
    axes: Axes = (None, None)
    embedding_init: Callable = nn.initializers.normal(0.02)
    frozen_id: int | None = None
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None

    def setup(self):
        """Declares the table, shared by the lookup and `attend`."""
        self.embedding = partitioned_param(
            self,
            "embedding",
            self.embedding_init,
            (self.num_embeddings, self.features),
            self.axes,
        )
        self.weight = WeightSite(self.quant, channel_axis=0)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integer [...] -> [..., features]."""
        # A table that is still a numpy array cannot be indexed by a traced one.
        rows = jnp.asarray(self.weight(self.embedding))[ids]
        if self.frozen_id is not None:
            frozen = (ids == self.frozen_id)[..., None]
            rows = jnp.where(frozen, jax.lax.stop_gradient(rows), rows)
        return rows.astype(self.dtype)

    def attend(self, x: jax.Array, *, quantized: bool = False) -> jax.Array:
        """[..., features] -> float32 [..., num_embeddings]: logits of a tied decoder, no bias.

        Args:
          x: the hidden states.
          quantized: multiply by the table on its grid, as the lookup does.
        """
        table = (self.weight(self.embedding) if quantized else self.embedding).astype(self.dtype)
        rows = x.astype(self.dtype).reshape(-1, self.features)  # as in Dense
        logits = jnp.matmul(rows, table.T, preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], self.num_embeddings)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32.

    Attributes:
      epsilon: added to the variance.
      dtype: dtype of the result.
      quant: how scale and output are quantized.
    """

    epsilon: float = 1e-12
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        width = (x.shape[-1],)
        scale = partitioned_param(self, "scale", nn.initializers.ones, width, (None,))
        bias = partitioned_param(self, "bias", nn.initializers.zeros, width, (None,))
        scale = WeightSite(self.quant, name="weight")(scale)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
        return Site(self.quant, name="output")(y.astype(self.dtype))
