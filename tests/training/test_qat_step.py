"""The step of quantization-aware training: micro-batches and meshes."""

import functools

import jax
import numpy as np
import pytest

from quantizable_flax.data.tasks import make_task
from quantizable_flax.ptq.calibrate import calibrate_step, with_weight_ranges
from quantizable_flax.ptq.trained import model_to_train
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training import qat
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from tests.tiny import tiny_config
from tests.training.test_qat import MODES
from tests.training.test_step import NO_DROPOUT, random_batch


def bert_state(tmp_path, mode: str, devices=None, **changes):
    """(model, state with calibrated ranges, step function, a batch, mesh)."""
    keys = {"quant__train": True, **NO_DROPOUT, **MODES[mode], **changes}
    config = tiny_config(tmp_path, **keys)
    mesh = make_mesh(config.mesh, devices)
    model, optimizer = model_to_train(config), make_optimizer(config, 80)
    state = init_state(
        model, optimizer, model.example_batch(), 0, mesh, learned_ranges=mode == "learned"
    )
    state = qat.calibrated(config, model, make_task(config), state)
    batch = random_batch(config, np.random.default_rng(0))
    return model, state, make_train_step(model, optimizer, config, mesh, state), batch, mesh


def test_accumulation_moves_ranges_with_every_micro_batch(tmp_path):
    model, state, step, batch, mesh = bert_state(tmp_path, "running", train__grad_accum_steps=2)
    params, ranges = jax.device_get((state.params, state.ranges))
    batch = put_batch(batch, mesh)
    state, metrics = step(state, batch)
    for part in range(2):
        micro = {key: value[part::2] for key, value in batch.items()}
        ranges = calibrate_step(model, params, ranges, micro, {})
    assert np.isfinite(metrics["loss"])
    expected = jax.jit(functools.partial(with_weight_ranges, model))(state.params, ranges)
    for a, b in zip(jax.tree.leaves(state.ranges), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_step_asks_no_weight_whether_its_range_is_known(tmp_path):
    _, state, step, batch, _ = bert_state(tmp_path, "running")
    text = step.lower(state, batch).as_text()
    assert "stablehlo.case" not in text
    assert "stablehlo.if" not in text


def curves_of_devices(tmp_path, mode: str) -> list[list[float]]:
    """Losses and a range, on one device and on both."""
    curves = []
    both = {"data": 2} if mode == "running" else {"data": 1, "fsdp": 2}
    for sizes in ({}, both):
        devices = jax.devices()[: 2 if sizes else 1]
        keys = {f"mesh__{axis}": size for axis, size in sizes.items()}
        _, state, step, batch, mesh = bert_state(tmp_path, mode, devices, **keys)
        values = []
        for _ in range(3):
            state, metrics = step(state, put_batch(batch, mesh))
            values.append(float(metrics["loss"]))
        if mode == "running":
            known = state.ranges["layer_0"]["ffn_residual"]["range"]
            values += [float(known.min), float(known.max)]
        curves.append(values)
    return curves


@pytest.mark.parametrize("mode", ["running", pytest.param("learned", marks=pytest.mark.slow)])
def test_two_devices_train_as_one(tmp_path, mode):
    one, two = curves_of_devices(tmp_path, mode)
    # A sum in another order may put a value on the other side of a rounding boundary.
    np.testing.assert_allclose(two, one, rtol=2e-3)
