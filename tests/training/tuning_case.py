"""Runs of the tuning recipe before their first step."""

import importlib

import numpy as np

from quantizable_flax.data.tasks import make_task
from quantizable_flax.ptq.trained import model_to_train
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training import initial, qat
from quantizable_flax.training.distillation import make_objective
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from quantizable_flax.training.teacher import load_teacher

RECIPE = importlib.import_module("configs.tune")
SHORT = {
    "data__validation_fraction": 0.2,
    "eval__batch_size": 4,
    "train__batch_size": 8,
    "train__steps": 8,
    "train__log_every": 4,
    "train__eval_every": 4,
    "train__telemetry_every": 4,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 2e-4,
    "checkpoint__every": 4,
    "quant__calibration_batches": 2,
    "quant__calibration_batch_size": 4,
}


def recipe(model: str, data: str, tmp_path, variant: str = "plain", **changes):
    """The recipe for a model, shortened; changes are written with `__` for a dot."""
    config = RECIPE.get_config(f"{variant},{model}")
    config.data.files = data
    if "cache_dir" in config.data:
        config.data.cache_dir = str(tmp_path / "cache")
    for path, value in (SHORT | changes).items():
        *groups, key = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


class Case:
    """A run of the recipe before its first step."""

    def __init__(self, config, devices=None):
        self.config, self.mesh = config, make_mesh(config.mesh, devices)
        self.model = model_to_train(config)
        optimizer = make_optimizer(config, config.train.steps)
        teacher = load_teacher(config, self.model, self.mesh)
        self.objective = make_objective(config, self.model, teacher)
        self.state = init_state(self.model, optimizer, self.model.example_batch(), 0, self.mesh)
        self.state, assets = initial.start_from(config, self.state)
        if config.quant.train:
            task = make_task(config, initial.for_data(config, assets))
            self.state = qat.calibrated(config, self.model, task, self.state)
        self._step = make_train_step(
            self.model, optimizer, config, self.mesh, self.state, self.objective
        )

    def batch(self, seed: int = 0) -> dict:
        rng, rows = np.random.default_rng(seed), self.config.train.batch_size
        if self.config.model.name == "vit":
            return {"images": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8)}
        length = self.config.data.seq_len
        ids = rng.integers(5, self.config.model.vocab_size, (rows, length)).astype(np.int32)
        if self.config.model.name == "opt":
            return {"input_ids": ids, "labels": ids}
        shown = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
        return {"input_ids": ids, "attention_mask": shown.astype(np.int32)}

    def step(self, seed: int = 0) -> dict[str, float]:
        given = self.objective.given
        self.state, metrics = self._step(self.state, put_batch(self.batch(seed), self.mesh), *given)
        return {name: float(value) for name, value in metrics.items()}

    def program(self) -> str:
        batch = put_batch(self.batch(), self.mesh)
        return self._step.lower(self.state, batch, *self.objective.given).as_text()
