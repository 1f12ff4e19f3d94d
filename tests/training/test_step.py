"""The training step: accumulation, rematerialisation, chunks of the loss, donation."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from quantizable_flax.models.build import build_model
from quantizable_flax.models.opt import OptForCausalLM
from quantizable_flax.models.shapes import boxed_shapes
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from tests.tiny import tiny_config

NO_DROPOUT = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0}


def random_batch(config, rng) -> dict[str, np.ndarray]:
    size, model = config.train.batch_size, config.model
    if model.name == "vit":
        shape = (size, model.image_size, model.image_size, model.channels)
        labels = rng.integers(model.num_classes, size=size, dtype=np.int32)
        return {"images": rng.integers(256, size=shape, dtype=np.uint8), "labels": labels}
    shape = (size, config.data.seq_len)
    ids = rng.integers(5, model.vocab_size, shape, dtype=np.int32)
    labels = np.where(rng.random(shape) < 0.15, ids, np.int32(-100))
    return {"input_ids": ids, "labels": labels}


def losses(config, steps: int = 5, devices=None) -> tuple[list[float], dict]:
    """Loss of each step on fixed random batches, and the final parameters."""
    mesh = make_mesh(config.mesh, devices)
    model, optimizer = build_model(config), make_optimizer(config, 80)
    rng = np.random.default_rng(0)
    values = []
    state = step = None
    for _ in range(steps):
        batch = put_batch(random_batch(config, rng), mesh)
        if state is None:
            state = init_state(model, optimizer, batch, 0, mesh)
            step = make_train_step(model, optimizer, config, mesh, state)
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    return values, jax.device_get(state.params)


def test_accumulation_weighs_every_token_alike(tmp_path):
    whole, whole_params = losses(tiny_config(tmp_path, **NO_DROPOUT))
    split, split_params = losses(tiny_config(tmp_path, train__grad_accum_steps=4, **NO_DROPOUT))
    # Only the order of float32 sums differs; Adam's division amplifies it in the parameters.
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole_params), jax.tree.leaves(split_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_state_is_donated(tmp_path):
    config = tiny_config(tmp_path)
    mesh = make_mesh(config.mesh)
    model, optimizer = build_model(config), make_optimizer(config, 80)
    batch = put_batch(
        {"input_ids": np.ones((8, 16), np.int32), "labels": np.ones((8, 16), np.int32)}, mesh
    )
    state = init_state(model, optimizer, batch, 0, mesh)
    compiled = make_train_step(model, optimizer, config, mesh, state).lower(state, batch).compile()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes


def test_a_model_is_traced_once_for_its_state_and_once_for_all_who_ask(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "opt", model__hidden_size=24)  # no other test has asked for it
    mesh, calls, loss = make_mesh(config.mesh), [], OptForCausalLM.loss
    monkeypatch.setattr(OptForCausalLM, "loss", lambda *a, **k: calls.append(1) or loss(*a, **k))
    model = build_model(config)
    state = init_state(model, make_optimizer(config, 80), model.example_batch(), 0, mesh)
    assert len(calls) == 1
    found = [boxed_shapes(build_model(config)) for _ in range(3)]
    assert len(calls) == 2
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (nn.unbox(found[2]), state.params)]
    assert shapes[0] == shapes[1]


def lowered_step(config) -> str:
    """The lowered text of a step."""
    mesh, model = make_mesh(config.mesh), build_model(config)
    optimizer = make_optimizer(config, 80)
    batch = put_batch(random_batch(config, np.random.default_rng(0)), mesh)
    state = init_state(model, optimizer, batch, 0, mesh)
    return make_train_step(model, optimizer, config, mesh, state).lower(state, batch).as_text()


@pytest.mark.parametrize(("family", "remat"), [("bert", "dots"), ("opt", "full")])
def test_rematerialisation_changes_nothing_but_what_is_kept(tmp_path, family, remat):
    kept, kept_params = losses(tiny_config(tmp_path, family), 4)
    again, params = losses(tiny_config(tmp_path, family, train__remat=remat), 4)
    # Dropout draws the same numbers again; fusions differ, and Adam's division amplifies that.
    np.testing.assert_allclose(again, kept, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(kept_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rematerialisation_computes_products_again(tmp_path):
    layers = 2
    products = {
        remat: lowered_step(
            tiny_config(tmp_path, "opt", model__num_layers=layers, train__remat=remat)
        ).count("dot_general")
        for remat in ("none", "dots", "full")
    }
    # A layer has two products of activations, which "dots" computes again, and six with weights.
    # The result of the last of them is in nobody's gradient.
    assert products["dots"] - products["none"] == layers * 2
    assert products["full"] - products["none"] == layers * (2 + 6 - 1)


@pytest.mark.parametrize(("bits", "drawn"), [("auto", 0), ("rbg", 2)])
def test_every_dropout_draws_from_the_configured_generator(tmp_path, bits, drawn):
    changes = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    text = lowered_step(tiny_config(tmp_path, "opt", **changes, train__dropout_bits=bits))
    # The shapes of probabilities and of residual sums; on this CPU "auto" is threefry.
    shapes = re.findall(r"rng_bit_generator.*tensor<([\dx]+)xui32>\)", text)
    assert len(set(shapes)) == drawn


@pytest.mark.parametrize(("family", "chunk"), [("bert", 3), ("opt", 5)])
def test_loss_in_chunks_is_the_loss(tmp_path, family, chunk):
    changes = {**NO_DROPOUT, "train__loss_chunk": 0}
    whole, whole_params = losses(tiny_config(tmp_path, family, **changes))
    parts, params = losses(tiny_config(tmp_path, family, **changes | {"train__loss_chunk": chunk}))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)  # sums in another order, as above
    for a, b in zip(jax.tree.leaves(whole_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
