"""LayerNorm and RMSNorm whose scale and output pass through the tap."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.nn.layers import partitioned_param, quantized_param
from quantizable_flax.nn.partition import constrain
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.tensor import Tensor, apart, beside, values
from quantizable_flax.quantization.weight_site import WeightSite

NORMS = ("layer_norm", "rms_norm", "rms_norm_single")


class Norm(nn.Module):
    """Normalisation over the last axis, statistics in float32.

    `layer_norm` is `scale (x - mean) / sqrt(variance + epsilon) + bias`; `rms_norm` (arXiv
    1910.07467) `scale x / sqrt(mean(x^2) + epsilon)`; `rms_norm_single` the same with one learned
    number for all channels, so that none can be raised above the others (arXiv 2506.19697).

    Attributes:
      kind: one of NORMS.
      epsilon: added to the variance, or to the mean square.
      dtype: dtype of the result.
      quant: how scale and output are quantized.
    """

    kind: str = "layer_norm"
    epsilon: float = 1e-12
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        width = (x.shape[-1],)
        shape = (1,) if self.kind == "rms_norm_single" else width
        site = WeightSite(self.quant, parameter="scale", name="weight")
        scale = values(quantized_param(self, site, nn.initializers.ones, shape, (None,)))
        bias = None
        if self.kind == "layer_norm":
            bias = partitioned_param(self, "bias", nn.initializers.zeros, width, (None,))
        x = values(x).astype(jnp.float32)
        if self.quant is not None:
            x = apart(x)
        if self.kind == "layer_norm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = unit_mean_square(x, self.epsilon) * beside(scale, x)
        if bias is not None:
            y = y + beside(bias, x)
        y = constrain(y.astype(self.dtype), *("batch", "length")[: y.ndim - 1], None)
        return Site(self.quant, name="output")(y)


def unit_mean_square(x: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
