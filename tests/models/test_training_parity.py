"""Six AdamW steps against the original: losses, gradient norms, learning rates, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quantizable_flax import build_model
from quantizable_flax.interop import from_state_dict
from quantizable_flax.training.optimizer import make_optimizer, make_schedule
from tests.helpers import (
    batch_of,
    config_of,
    golden,
    golden_names,
    is_key_bias,
    pairs,
)


def train(file):
    """Returns (losses, gradient norms before clipping, final params) of the golden run."""
    settings = file.config
    config = config_of(file)
    config.model.hidden_dropout = config.model.attention_dropout = settings["dropout"]
    config.optimizer.learning_rate = settings["lr"]
    config.optimizer.warmup_steps = settings["warmup"]
    config.optimizer.b1, config.optimizer.b2 = settings["betas"]
    config.optimizer.eps = settings["eps"]
    config.optimizer.weight_decay = settings["weight_decay"]
    config.optimizer.decay_layer_norm = settings["wd_LN_gamma"]
    config.optimizer.clip_norm = settings["max_grad_norm"]
    model, optimizer = build_model(config), make_optimizer(config, settings["total_steps"])

    @jax.jit
    def step(params, state, batch):
        def mean_loss(params):
            scores = model.apply({"params": params}, batch, train=True, method="loss")
            return scores.loss.sum() / scores.weight.sum()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        norm = jnp.sqrt(sum(jnp.vdot(grad, grad) for grad in jax.tree.leaves(grads)))
        with jax.numpy_dtype_promotion("standard"):  # as the step of training does
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, norm

    params = jax.tree.map(jnp.asarray, from_state_dict(file.group("w0"), config))
    state, losses, norms = optimizer.init(params), [], []
    for index in range(len(file["out/loss"])):
        params, state, loss, norm = step(params, state, batch_of(file, index))
        losses.append(loss)
        norms.append(norm)
    return config, losses, norms, params


@pytest.mark.parametrize("name", golden_names("train_*"))
def test_trajectory_matches_the_original(name):
    file = golden(name)
    config, losses, norms, params = train(file)
    schedule = make_schedule(config.optimizer, file.config["total_steps"])
    rates = [schedule(index) for index in range(len(losses))]
    np.testing.assert_allclose(rates, file["out/lr_used"], rtol=1e-6)
    # Each step passes its rounding on to the next: a digit looser than a single step.
    np.testing.assert_allclose(losses, file["out/loss"], rtol=1e-5)
    np.testing.assert_allclose(norms, file["out/gradnorm_preclip"], rtol=1e-4)

    final, start = file.group("w1"), file.group("w0")
    filled = {key: final.get(key, np.full(w.shape, np.nan)) for key, w in start.items()}
    travelled = float(np.sum(file["out/lr_used"]))  # how far Adam can move one weight
    for path, actual, expected in pairs(params, from_state_dict(filled, config)):
        error = np.abs(actual - expected)[~np.isnan(expected)]
        if is_key_bias(path):
            # The exact gradient is 0, Adam divides its noise by its own size: anything within
            # reach is right.
            assert np.all(error <= 2.0 * travelled), path
        else:
            # Adam also magnifies the relative error of tiny gradients, so the bound is a share
            # of the distance that a weight can travel, not of the weight.
            assert np.all(error <= 1e-2 * travelled), path
            assert error.size == 0 or np.median(error) <= 1e-4 * travelled, path


@pytest.mark.parametrize("name", golden_names("train_*_gated"))
def test_decayed_parameters_are_those_of_the_original(name):
    file = golden(name)
    config, start = config_of(file), file.group("w0")
    filled = {
        key: np.full(w.shape, key in file.config["decayed"], np.float32) for key, w in start.items()
    }
    config.optimizer.update({"weight_decay": 0.5, "learning_rate": 1.0, "warmup_steps": 0})
    config.optimizer.decay_layer_norm = file.config["wd_LN_gamma"]  # OPT's, not BERT's
    optimizer = make_optimizer(config, 10)
    expected = from_state_dict(filled, config)
    ones = jax.tree.map(np.ones_like, expected)
    zeros = jax.tree.map(np.zeros_like, ones)
    with jax.numpy_dtype_promotion("standard"):  # as the step of training does
        updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(ones), ones)
    for path, update, decayed in pairs(updates, expected):
        np.testing.assert_allclose(update, -0.5 * decayed, err_msg=path)
