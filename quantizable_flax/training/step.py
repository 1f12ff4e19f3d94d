"""State and the jitted training step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.training.sharding import batch_sharding, replicated, tree_shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a step reads and replaces.

    Attributes:
      step: int32, steps taken.
      params: float32 parameters.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, example: Batch, seed: int, mesh: Mesh
) -> TrainState:
    """Returns the initial state, each leaf created where the mesh wants it."""

    def init(key):
        params = model.init(key, example, method="loss")["params"]
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(seed)), mesh)
    unboxed = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)
    return unboxed(jax.random.key(seed))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted, donating `(state, batch) -> (state, metrics)`.

    Metrics are replicated scalars: loss (nats per labelled item), accuracy (share of labels with
    the largest logit), grad_norm before clipping, and labels, their number. Dropout and Mixup draw
    from (seed, step), so a resumed run repeats an uninterrupted one.
    """
    accumulate, seed = config.train.accumulate, config.seed

    def loss_fn(params, batch, key):
        scores: Any = model.apply(
            {"params": params}, batch, train=True, method="loss", rngs={"dropout": key}
        )
        return jnp.sum(scores.loss), (jnp.sum(scores.weight), jnp.sum(scores.correct))

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, loss, (labels, correct) = _accumulate(loss_fn, state.params, batch, key, accumulate)
        # Sums are divided once, so a token weighs the same in whatever micro-batch it lies.
        scale = 1.0 / jnp.maximum(labels, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss * scale,
            "accuracy": correct * scale,
            "grad_norm": optax.tree.norm(grads),
            "labels": labels,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def _accumulate(loss_fn, params, batch: Batch, key: jax.Array, count: int):
    """Gradient, loss, and (labels, right ones) of a batch, all summed, in `count` parts."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        (loss, counts), grads = value_and_grad(params, batch, key)
        return grads, loss, counts

    def split(x):
        # Every count-th example, so that a micro-batch lies on all devices without moving.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, micro):
        index, micro_batch = micro
        (loss, counts), grads = value_and_grad(params, micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (grads, loss, counts)), None

    zero = jnp.float32(0.0)
    zeros = (jax.tree.map(jnp.zeros_like, params), zero, (zero, zero))
    micro_batches = (jnp.arange(count), jax.tree.map(split, batch))
    (grads, loss, counts), _ = jax.lax.scan(body, zeros, micro_batches)
    return grads, loss, counts
