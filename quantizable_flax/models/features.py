"""What a model knows of a batch before its head: hidden states, and one vector an example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

POOLINGS = ("mean", "cls")
TINY = 1e-24  # of a squared length


class Features(NamedTuple):
    """Of a batch, in float32.

    Attributes:
      hidden_BxTxD: the last hidden states.
      visible_BxT: 1 for a token, 0 for padding.
      pooled_BxD: the examples' embeddings, not normalised.
    """

    hidden_BxTxD: jax.Array
    visible_BxT: jax.Array
    pooled_BxD: jax.Array


def pooled(hidden_BxTxD: jax.Array, visible_BxT: jax.Array, pooling: str) -> Features:
    """Returns the features of hidden states.

    Args:
      hidden_BxTxD: the last hidden states.
      visible_BxT: 1 for a token, 0 for padding.
      pooling: "mean" over the visible tokens, or "cls", the first one.
    """
    hidden_BxTxD = hidden_BxTxD.astype(jnp.float32)
    visible_BxT = visible_BxT.astype(jnp.float32)
    if pooling == "cls":
        return Features(hidden_BxTxD, visible_BxT, hidden_BxTxD[:, 0])
    sum_BxD = jnp.einsum("BTD,BT->BD", hidden_BxTxD, visible_BxT)
    count_Bx1 = jnp.maximum(jnp.sum(visible_BxT, axis=1, keepdims=True), 1.0)
    return Features(hidden_BxTxD, visible_BxT, sum_BxD / count_Bx1)


def cosine(x_BxD: jax.Array, y_BxD: jax.Array) -> jax.Array:
    """The cosine of each pair of rows, [B]; 0 where either is 0."""
    return jnp.sum(unit(x_BxD) * unit(y_BxD), axis=-1)


def unit(x_BxD: jax.Array) -> jax.Array:
    """Each row divided by its length; a row of zeros points nowhere and stays."""
    norm_Bx1 = jnp.sum(jnp.square(x_BxD), axis=-1, keepdims=True)
    return x_BxD * jax.lax.rsqrt(jnp.maximum(norm_Bx1, TINY))
