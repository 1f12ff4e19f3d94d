"""What a loss may ask of a site: its activations, or what large ones cost."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Limit:
    """A soft limit, known when a program is traced: it has no arrays.

    Attributes:
      scale: the magnitude that costs 1.
      power: how steeply the cost rises beyond it.
    """

    scale: float = struct.field(pytree_node=False)
    power: int = struct.field(pytree_node=False)


@struct.dataclass
class Asked:
    """That a site's activations are asked for; known when a program is traced, without arrays."""


def cost_above(x: jax.Array, limit: Limit) -> jax.Array:
    """`mean((|x| / scale) ** power)` over all of x, a float32 scalar.

    The form of TWEO's loss (arXiv 2511.23225).
    """
    return jnp.mean((jnp.abs(x.astype(jnp.float32)) / limit.scale) ** limit.power)
