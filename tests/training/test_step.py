"""The training step: accumulation, meshes, donation, errors of the mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from quantizable_flax.errors import UserError
from quantizable_flax.models.registry import build_model
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.sharding import check_batch, make_mesh, put_batch
from quantizable_flax.training.step import init_state, make_train_step
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]
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
    split, split_params = losses(tiny_config(tmp_path, train__accumulate=4, **NO_DROPOUT))
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


MESHES = {
    "data": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}
# The axes are the same for all; one family tries each alone, the others all of them at once.
FAMILY_MESHES = {"bert": tuple(MESHES), "opt": ("mixed",), "vit": ("mixed",)}


def curves_of_all_meshes(tmp_path, family: str) -> dict[str, list[float]]:
    """Runs in a process with 8 virtual devices, see below; ViT mixes its batches."""
    changes = {**NO_DROPOUT, "model__attention__gate": "linear"}
    if family == "opt":
        changes["model__vocab_size"] = 304  # a multiple of the tensor axis
    one = tiny_config(tmp_path, family, **changes)
    curves = {"one": losses(one, devices=jax.devices()[:1])[0]}
    for name in FAMILY_MESHES[family]:
        sizes = MESHES[name]
        mesh_keys = {f"mesh__{axis}": size for axis, size in sizes.items()}
        curves[name] = losses(tiny_config(tmp_path, family, **changes, **mesh_keys))[0]
    return curves


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_any_mesh_trains_as_one_device(tmp_path, family):
    code = (
        "import json, pathlib, sys; from tests.training.test_step import curves_of_all_meshes;"
        "print(json.dumps(curves_of_all_meshes(pathlib.Path(sys.argv[1]), sys.argv[2])))"
    )
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), family],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads(done.stdout.splitlines()[-1])
    for name in FAMILY_MESHES[family]:
        # Sums over devices are taken in another order, nothing else may differ.
        np.testing.assert_allclose(curves[name], curves["one"], rtol=1e-5, err_msg=name)


def test_mesh_and_batch_errors_name_the_numbers(tmp_path):
    config = tiny_config(tmp_path)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match=r"multiple of .* = 1 \* 3, found 8"):
        check_batch(8, 3, mesh)
    with pytest.raises(UserError, match=r"must use all 1 devices, found data=-1, fsdp=2"):
        make_mesh(tiny_config(tmp_path, mesh__fsdp=2).mesh, jax.devices()[:1])
    with pytest.raises(UserError, match="one of them may be -1"):
        make_mesh(tiny_config(tmp_path, mesh__fsdp=-1).mesh, jax.devices()[:1])
