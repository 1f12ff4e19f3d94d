"""A model of one's own, trained, with its row: python -m examples.own_model.

Its embedding, block and loss are written here, in Flax and three things of this package: attention,
`Dense` and `Site`. It learns to repeat the first half of a sequence of random tokens, one in ten of
which comes back as another. Prints the perplexity of the second half (32 for who knows nothing,
1.92 at best), maximum infinity norm and average kurtosis of its hidden states, the perplexity in
W8A8 and W4A8, and how far the logits of real INT8 are from the simulated ones.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import quantizable_flax as qf

VOCAB, WIDTH, HALF, STEPS = 32, 64, 8, 400
CLIPPED = qf.make_softmax("clipped", gamma=-0.03)


class Block(nn.Module):
    quant: qf.QuantSpec | None

    @nn.compact
    def __call__(self, x_BxTxD, mask):
        y = nn.LayerNorm()(x_BxTxD)
        y = qf.MultiHeadAttention(4, softmax=CLIPPED, quant=self.quant, name="attention")(y, mask)
        x_BxTxD = x_BxTxD + qf.values(y)  # a quantized layer gives codes
        y = nn.LayerNorm()(x_BxTxD)
        y = qf.Dense(4 * WIDTH, activation=nn.relu, quant=self.quant, name="ffn_in")(y)
        y = qf.Dense(WIDTH, quant=self.quant, name="ffn_out")(y)
        return qf.values(qf.Site(self.quant, name="residual")(x_BxTxD + qf.values(y)))


class Copier(nn.Module):
    quant: qf.QuantSpec | None = None

    @nn.compact
    def __call__(self, ids_BxT):
        length = ids_BxT.shape[1]
        place_TxD = self.param("place", nn.initializers.normal(0.1), (2 * HALF, WIDTH))
        x_BxTxD = nn.Embed(VOCAB, WIDTH, name="token")(ids_BxT) + place_TxD[None, :length]
        x_BxTxD = qf.values(qf.Site(self.quant, name="embedded")(x_BxTxD))
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
        x_BxTxD = Block(self.quant, name="block")(x_BxTxD, mask)
        return qf.values(qf.Dense(VOCAB, quant=self.quant, name="head")(x_BxTxD))

    def loss(self, batch):
        return qf.token_scores(self(batch["ids"][:, :-1]), batch["labels"])


@jax.jit
def batch_of(seed):
    tokens_key, noise_key = jax.random.split(jax.random.key(seed))
    first, other = jax.random.randint(tokens_key, (2, 64, HALF), 0, VOCAB)
    second = jnp.where(jax.random.bernoulli(noise_key, 0.9, first.shape), first, other)
    nothing = jnp.full((64, HALF - 1), -100)  # the first half cannot be known
    ids, labels = (jnp.concatenate([x, second], axis=1) for x in (first, nothing))
    return {"ids": ids, "labels": labels}


@jax.jit
def train_step(params, moments, seed):
    def loss(params):
        scores = Copier().apply({"params": params}, batch_of(seed), method="loss")
        return scores.loss.sum() / scores.weight.sum()

    updates, moments = optimizer.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments


optimizer = optax.adam(2e-3)
params = nn.unbox(Copier().init(jax.random.key(0), batch_of(0), method="loss"))["params"]
held_out, seen = ([batch_of(seed) for seed in seeds] for seeds in (range(-4, 0), range(16)))
moments = optimizer.init(params)
for step in range(STEPS):
    params, moments = train_step(params, moments, step)
row = qf.evaluate(
    Copier(),
    params,
    held_out,
    calibration_batches=seen,
    outliers="block/(ffn_out/output|residual)",
    settings=("w8a8", "w4a8"),
)
for name in ("fp", "max_inf_norm", "avg_kurtosis", "w8a8", "w4a8"):
    print(f"{name:13} {row[name]:9.4f}")

model = qf.with_quant(Copier(), qf.QuantSpec())
ranges = qf.calibrate(model, params, seen)
ids = held_out[0]["ids"]
simulated = jax.jit(model.apply)({"params": params, "ranges": ranges}, ids)
int8_model, int8_params = qf.to_int8(model, params, ranges, held_out[0])
integers = jax.jit(int8_model.apply)({"params": int8_params}, ids)
print(f"int8 differs  {jnp.abs(integers - simulated).max() / jnp.abs(simulated).max():9.1e}")
