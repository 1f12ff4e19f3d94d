"""QK-norm: each head's queries and keys at unit root mean square, times a learned scale.

As in Qwen3 (arXiv 2505.09388): RMS normalisation (arXiv 1910.07467) over the width of a head, with
one scale [K] that all heads share, between projection and scores. ViT-22B (arXiv 2302.05442) has a
LayerNorm there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.nn.layers import quantized_param
from quantizable_flax.nn.norm import unit_mean_square
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.tensor import apart, beside, values
from quantizable_flax.quantization.weight_site import WeightSite

EPSILON = 1e-6  # added to the mean square, as in Qwen3


class HeadNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + EPSILON)` of each head, in float32.

    It has no site of its own: as the activation of its projection it stands before the site of
    that, so that what enters the scores is what is measured and quantized.

    Attributes:
      num_heads: H; must divide the width of x.
      quant: how the scale is quantized, as LayerNorms' are.
    """

    num_heads: int
    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """[..., H * K] -> [..., H * K], in its dtype."""
        size = y.shape[-1] // self.num_heads
        site = WeightSite(self.quant, parameter="scale", name="weight")
        scale_K = values(quantized_param(self, site, nn.initializers.ones, (size,), (None,)))
        x = y.astype(jnp.float32).reshape(*y.shape[:-1], self.num_heads, size)
        if self.quant is not None:
            x = apart(x)
        x = unit_mean_square(x, EPSILON) * beside(scale_K, x)
        return x.reshape(y.shape).astype(y.dtype)
