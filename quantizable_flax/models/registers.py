"""Learned tokens: registers without a position, and what ViT puts before its patches.

Registers (arXiv 2309.16588) are what a head may look at when it has nothing to do. Those of a text
stand before its first token: all tokens see them, of a causal model too, they have no label, and
they are dropped before what stands behind the layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.nn.layers import quantized_param
from quantizable_flax.quantization.tensor import Tensor, values
from quantizable_flax.quantization.weight_site import WeightSite


def learned_table(module: nn.Module, config: Any, name: str, rows: int) -> jax.Array:
    """A parameter [rows, D] of a module that is being called, through a site, as computed."""
    site = WeightSite(config.quant, parameter=name, channel_axis=0, name=f"{name}_weight")
    shape = (rows, config.hidden_size)
    table = quantized_param(module, site, config.kernel_init, shape, (None, "embed"))
    return values(table).astype(config.dtype)


def learned_tokens(
    module: nn.Module, config: Any, name: str, rows: int, batch_size: int
) -> jax.Array:
    """The same tokens for every example: [B, rows, D]."""
    table = learned_table(module, config, name, rows)
    return jnp.broadcast_to(table, (batch_size, *table.shape))


class Registers(nn.Module):
    """`config.num_registers` learned tokens before a text.

    Attributes:
      config: of the model.
    """

    config: Any

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, R + T, D]."""
        count = self.config.num_registers
        tokens = learned_tokens(self, self.config, "register_tokens", count, x_BxTxD.shape[0])
        return jnp.concatenate([tokens, x_BxTxD], axis=1)


def check_registers(count: int) -> None:
    """Raises UserError for a negative number of registers."""
    if count < 0:
        raise UserError(f"model.num_registers must not be negative, found {count}.")


def shown(visible_BxT: jax.Array | None, count: int) -> jax.Array | None:
    """A mask of the tokens, [B, T], with registers that all see before them: [B, count + T]."""
    if visible_BxT is None or not count:
        return visible_BxT
    return jnp.pad(visible_BxT, ((0, 0), (count, 0)), constant_values=1)


def behind(x_BxTxD: Tensor, count: int) -> Tensor:
    """Hidden states without those of registers: [B, count + T, D] -> [B, T, D]."""
    return x_BxTxD[:, count:] if count else x_BxTxD
