"""What tests of meshes ask a process with eight virtual devices.

`python -m tests.training.mesh_case` prints one JSON object; see test_mesh.py.
"""

import json
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np

from quantizable_flax.models.build import build_model
from quantizable_flax.nn.dropout_bits import dropout_key
from quantizable_flax.runtime.mesh import batch_sharding, make_mesh, put_batch
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from tests.tiny import tiny_config
from tests.training.test_step import NO_DROPOUT, losses, random_batch

STEPS = 20
CHUNK = 4
VOCAB = 304  # a multiple of every tensor axis here, and no other size
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "sequence": {"data": 2, "sequence": 4},
    "mixed": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
}
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def mesh_config(tmp_path, family: str, mesh: str | None = None, **changes):
    """A gated model whose heads, vocabulary and tokens every mesh here divides."""
    gate = "elementwise" if family == "bert" else "linear"
    changes |= {**NO_DROPOUT, "model__attention__gate": gate, "model__num_heads": 4}
    if family == "bert":  # what else has parameters of its own
        changes |= {"model__attention__qk_norm": True, "model__num_registers": 4}
    if family == "vit":
        changes["model__num_registers"] = 3  # eight tokens
    else:
        changes |= {"model__vocab_size": VOCAB, "train__loss_chunk": CHUNK}
    sizes = MESHES[mesh] if mesh else {}
    return tiny_config(
        tmp_path, family, **changes, **{f"mesh__{axis}": size for axis, size in sizes.items()}
    )


def curves(tmp_path, family: str) -> dict[str, list[float]]:
    """The loss of each step on one device and on every mesh."""
    one = losses(mesh_config(tmp_path, family), STEPS, jax.devices()[:1])
    # Each axis alone is tried with one family.
    names = MESHES if family == "opt" else ["mixed"]
    others = {name: losses(mesh_config(tmp_path, family, name), STEPS) for name in names}
    return {name: values for name, (values, _) in {"one": one, **others}.items()}


def program(tmp_path, family: str, mesh: str) -> dict[str, Any]:
    """The compiled step: shapes of all arrays, (kind, result) of its collectives, its sizes.

    `rows` are the tokens of a batch.
    """
    every = {"model__max_predictions": 0} if family == "bert" else {}
    layers = 2 if family == "opt" else 1
    config = mesh_config(tmp_path, family, mesh, model__num_layers=layers, **every)
    devices, model = make_mesh(config.mesh), build_model(config)
    optimizer = make_optimizer(config, 80)
    batch = put_batch(random_batch(config, np.random.default_rng(0)), devices)
    state = init_state(model, optimizer, batch, 0, devices)
    step = make_train_step(model, optimizer, config, devices, state)
    text = step.lower(state, batch).compile().as_text()
    return {
        "rows": config.train.batch_size * config.data.get("seq_len", 0),
        "width": config.model.hidden_size,
        "layers": layers,
        "shapes": sorted(set(re.findall(r"\w+\[[\d,]*\]", text))),
        "collectives": [(kind, result) for result, kind in COLLECTIVE.findall(text)],
    }


def masks(tmp_path, mesh: str) -> dict[str, Any]:
    """Dropout of 16 examples by each device's own generator, in two micro-batches rematerialised.

    `drawn` are the shapes that the program draws, `examples` how many masks differ.
    """
    devices = make_mesh(mesh_config(tmp_path, "opt", mesh).mesh)
    x = jax.device_put(np.ones((16, 4, 8, 32), np.float32), batch_sharding(devices))

    @jax.jit
    def dropped(x):
        key = dropout_key("rbg", 0, devices)

        @jax.checkpoint
        def body(sum, index):
            mask = jax.random.bernoulli(jax.random.fold_in(key, index), 0.75, x.shape)
            return sum + jax.numpy.where(mask, x, 0.0), None

        return jax.lax.scan(body, jax.numpy.zeros_like(x), jax.numpy.arange(2))[0]

    lowered = dropped.lower(x)
    values = np.asarray(dropped(x))
    return {
        "drawn": re.findall(r"rng_bit_generator.*, tensor<([\dx]+)xui32>\)", lowered.as_text()),
        "collectives": COLLECTIVE.findall(lowered.compile().as_text()),
        "examples": len({example.tobytes() for example in values}),
        "mean": float(values.mean()),
    }


if __name__ == "__main__":
    what, folder, *arguments = sys.argv[1:]
    answer = {"curves": curves, "program": program, "masks": masks}[what]
    print(json.dumps(answer(pathlib.Path(folder), *arguments)))
