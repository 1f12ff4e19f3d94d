"""What a large activation costs in a loss, the form of TWEO (arXiv 2511.23225)."""

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


def cost_above(x: jax.Array, limit: Limit) -> jax.Array:
    """`mean((|x| / scale) ** power)` over all of x, a float32 scalar."""
    return jnp.mean((jnp.abs(x.astype(jnp.float32)) / limit.scale) ** limit.power)
