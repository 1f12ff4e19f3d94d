"""State and the jitted training step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.nn.dropout_bits import dropout_key
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.ptq.calibrate import first_ranges, with_grids, with_weight_ranges
from quantizable_flax.runtime.mesh import batch_sharding, replicated, tree_shardings
from quantizable_flax.training.objective import Batch, Labels, Metrics, Objective


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    example: Batch,
    seed: int,
    mesh: Mesh,
    *,
    learned_ranges: bool = False,
) -> TrainState:
    """Returns the initial state, each leaf created where the mesh wants it.

    The ranges of a model with a quant spec are there, those of activations still unknown; with
    `learned_ranges` they are grids among the parameters.
    """
    init = jax.jit(_initial(model, optimizer, example, learned_ranges))  # traced once for both
    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(seed)), mesh)
    unboxed = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)
    return unboxed(jax.random.key(seed))


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    example: Batch,
    mesh: Mesh,
    *,
    learned_ranges: bool = False,
) -> TrainState:
    """Returns the state of `init_state` as shapes, dtypes and shardings, without its arrays.

    The devices of the mesh need not exist: the step is compiled ahead of time from this.
    """
    boxed = jax.eval_shape(_initial(model, optimizer, example, learned_ranges), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def _initial(
    model: nn.Module, optimizer: optax.GradientTransformation, example: Batch, learned_ranges: bool
) -> Callable[[jax.Array], TrainState]:
    """Returns `key -> state`, its parameters boxed with their logical axes."""

    def init(key):
        params, ranges = model.init(key, example, method="loss")["params"], {}
        if model.config.quant is not None:
            ranges = first_ranges(model, nn.unbox(params))
            if learned_ranges:
                params, ranges = with_grids(model, params, ranges), {}
        return TrainState(jnp.int32(0), params, optimizer.init(params), ranges)

    return init


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    objective: Objective | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted, donating `(state, batch, *objective.given) -> (state, metrics)`.

    Metrics are replicated scalars: those of the objective, by default `Labels`, and grad_norm
    before clipping. Dropout and Mixup draw from (seed, step), so a resumed run repeats an
    uninterrupted one; with the accelerator's generator (`train.dropout_bits`) on the same mesh.

    Running ranges of activations move with every micro-batch, before it is rounded by them, as in
    calibration; so `train.grad_accum_steps` of them are `quant.momentum` to that power in a step.
    Those of the weights are taken anew behind each update.
    """
    count, seed = config.train.grad_accum_steps, config.seed
    bits = config.train.dropout_bits
    aim = Labels(model) if objective is None else objective

    def train_step(state, batch, *given):
        # Dropout and schedules would draw and compute in float64 where JAX_ENABLE_X64 is set.
        with jax.enable_x64(False):
            return update(state, batch, *given)

    def update(state, batch, *given):
        key = jax.random.fold_in(dropout_key(bits, seed, mesh), state.step)
        with on_mesh(mesh):
            loss_fn = aim.loss(batch, count, *given)
            (grads, loss, sums), ranges = _accumulate(loss_fn, state, batch, key, count, aim.zeros)
        scale, metrics = aim.finish(loss, sums)
        grads = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies steps by floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        if ranges:
            ranges = with_weight_ranges(model, params, ranges)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ranges), metrics

    shardings = jax.tree.map(lambda x: x.sharding, state)
    given_shardings = jax.tree.map(lambda x: x.sharding, aim.given)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), *given_shardings),
        out_shardings=(shardings, replicated(mesh)),
    )


def _accumulate(loss_fn, state: TrainState, batch: Batch, key: jax.Array, count: int, no_sums: Any):
    """A batch in `count` parts: (gradient, loss, the objective's sums), all summed; and ranges."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    params = state.params
    if count == 1:
        (loss, (sums, ranges)), grads = value_and_grad(params, state.ranges, batch, key)
        return (grads, loss, sums), ranges

    def split(x):
        # Every count-th example, so that a micro-batch lies on all devices without moving.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, micro):
        (sums, ranges), (index, micro_batch) = carry, micro
        (loss, (counts, ranges)), grads = value_and_grad(
            params, ranges, micro_batch, jax.random.fold_in(key, index)
        )
        return (jax.tree.map(jnp.add, sums, (grads, loss, counts)), ranges), None

    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0.0), no_sums)
    micro_batches = (jnp.arange(count), jax.tree.map(split, batch))
    (sums, ranges), _ = jax.lax.scan(body, (zeros, state.ranges), micro_batches)
    return sums, ranges
