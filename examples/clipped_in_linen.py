"""Clipped softmax in the attention of flax.linen: python -m examples.clipped_in_linen.

The parameters stay as they are, only `attention_fn` changes. Prints for Flax's own attention, for
gamma 0 (the same numbers: nothing is stretched) and for gamma -0.05 how far the output is from
Flax's own, and how many of the attention probabilities are exactly 0.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import quantizable_flax as qf

HEADS = 4


def describe(name, attention, params, x_BxTxD, expected_BxTxD):
    out_BxTxD, kept = attention.apply(params, x_BxTxD, sow_weights=True, mutable=["intermediates"])
    (probs_BxHxTxS,) = kept["intermediates"]["attention_weights"]
    difference = jnp.abs(out_BxTxD - expected_BxTxD).max()
    zeros = jnp.sum(probs_BxHxTxS == 0.0)
    print(f"{name:12} difference {difference:.1e}  zeros {zeros} of {probs_BxHxTxS.size}")


x_BxTxD = jax.random.normal(jax.random.key(0), (2, 32, 64))
flax_own = nn.MultiHeadDotProductAttention(HEADS)
params = flax_own.init(jax.random.key(1), x_BxTxD)
expected_BxTxD = flax_own.apply(params, x_BxTxD)

describe("flax", flax_own, params, x_BxTxD, expected_BxTxD)
for gamma in (0.0, -0.05):
    clipped = nn.MultiHeadDotProductAttention(
        HEADS, attention_fn=qf.attention_fn("clipped", gamma=gamma)
    )
    describe(f"gamma {gamma:g}", clipped, params, x_BxTxD, expected_BxTxD)
