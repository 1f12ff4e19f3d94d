"""Clipped softmax and a gate in flax.nnx: python -m examples.nnx_attention.

`nnx.MultiHeadAttention` takes `attention_fn` as Linen's attention does. Prints for its own
attention, for gamma 0 (the same but for rounding) and for gamma -0.05 how far the output is from
its own, and how many attention probabilities are exactly 0. A gate reads the layer's input, which
no `attention_fn` sees: our module has it, and `nnx.bridge` makes that one of NNX. Prints how large
its output is as a share of that without a gate, which is pi_init at the start, and the norm of the
gate's gradient.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import quantizable_flax as qf

HEADS, WIDTH = 4, 64


def our_module(gate):
    linen = qf.MultiHeadAttention(HEADS, gate=gate)
    with nnx.use_eager_sharding(False):  # there is no mesh for the logical axes of parameters
        return nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(1)).lazy_init(x_BxTxD)


x_BxTxD = jax.random.normal(jax.random.key(0), (2, 32, WIDTH))
attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(1))
expected_BxTxD = attention(x_BxTxD)
functions = {
    "nnx": nnx.dot_product_attention,
    "gamma 0": qf.attention_fn("clipped", gamma=0.0),
    "gamma -0.05": qf.attention_fn("clipped", gamma=-0.05),
}
for name, function in functions.items():
    attention.attention_fn = function
    watched = nnx.capture(attention, nnx.Intermediate)
    out_BxTxD, kept = watched(x_BxTxD, sow_weights=True)
    difference = jnp.abs(out_BxTxD - expected_BxTxD).max()
    (probs_BxHxTxS,) = kept["attention_weights"]
    zeros = jnp.sum(probs_BxHxTxS == 0.0)
    print(f"{name:12} difference {difference:.1e}  zeros {zeros} of {probs_BxHxTxS.size}")

ungated, gated = (our_module(gate) for gate in (None, qf.GateConfig("linear", pi_init=0.25)))
share = jnp.linalg.norm(gated(x_BxTxD)) / jnp.linalg.norm(ungated(x_BxTxD))
gradient = nnx.grad(lambda module: jnp.mean(module(x_BxTxD) ** 2))(gated)
norm = jnp.linalg.norm(gradient["gate"]["kernel"].get_value())
print(f"gated        share {share:.3f}  gradient {norm:.1e}")
