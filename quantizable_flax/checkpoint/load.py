"""A trained run as a model and its parameters, from the path alone."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.checkpoint import resume, store
from quantizable_flax.errors import UserError
from quantizable_flax.models.build import build_model, with_config, with_quant
from quantizable_flax.ptq.trained import trained_model, trained_spec
from quantizable_flax.quantization.spec import QuantSpec


class Run(NamedTuple):
    """What a workdir holds.

    Attributes:
      config: of the training run.
      model: the Linen module.
      params: its parameters, float32, on this process's first device.
      assets: saved with the run: its tokenizer, or the names of its classes.
      info: `step`, `train_seconds`, `versions`; of an INT8 model `quant`, its scheme.
      ranges: the running ranges of quantization-aware training, None where there are none.
      trained_spec: the scheme that was trained, None for training in floating point.
    """

    config: ConfigDict
    model: nn.Module
    params: Any
    assets: dict[str, Any]
    info: dict[str, Any]
    ranges: Any = None
    trained_spec: QuantSpec | None = None

    @property
    def is_int8(self) -> bool:
        """Whether it is an exported model, which computes on integers."""
        return "quant" in self.info

    @property
    def notes(self) -> store.Notes:
        """What a checkpoint of this run says beside the parameters, but for the data position."""
        return store.Notes({}, self.config.to_dict(), self.assets, self.info)


def load(path: str) -> tuple[nn.Module, Any]:
    """Returns (model, params) of the newest readable checkpoint of a run.

    Args:
      path: the workdir of a run, the folder of one step in its `checkpoints/`, or what
        `quantizable_flax.export` wrote: that model runs on integers.

    Raises:
      UserError: no checkpoint there, or none that can be read.
    """
    run = load_run(path)
    return run.model, run.params


def load_run(path: str) -> Run:
    """As `load`, with configuration, assets and notes."""

    def read(workdir, step: int) -> Run:
        notes = store.read_notes(workdir, step)
        config = configuration.from_dict(notes.config)
        params = store.restore_params(workdir, step)
        ranges = store.restore_ranges(workdir, step)
        model, spec = _model(config, notes.info), trained_spec(config)
        return Run(config, model, params, notes.assets, notes.info, ranges, spec)

    return resume.read_path(store.absolute(path), read)


def _model(config: ConfigDict, info: Mapping[str, Any]) -> nn.Module:
    """The run's model; one that was exported computes on integers, and in float32 between."""
    if "quant" not in info:
        return trained_model(config)
    model = build_model(config)
    return with_quant(with_config(model, dtype=jnp.float32), QuantSpec.from_dict(info["quant"]))


def override_run(run: Run, arguments: list[str]) -> None:
    """Applies `--config.a.b=value` arguments to the configuration of a trained run.

    Other `data.files` come without the run's own validation files.

    Raises:
      UserError: as `config.override`, or a key of the model, which is trained already.
    """
    keys = [argument.lstrip("-").partition("=")[0] for argument in arguments]
    for key in keys:
        if key.startswith("config.model."):
            raise UserError(f"--{key} cannot be changed: the model is trained already.")
    if "config.data.files" in keys:
        run.config.data.source = "auto"
        run.config.data.validation_files = None
    configuration.override(run.config, arguments)


def row_names(runs: Mapping[str, Run]) -> list[str]:
    """A short name for each workdir: the configured one, or the folder's; unique, else the path.

    Runs of several families have the family before it.
    """
    several = len({run.config.model.name for run in runs.values()}) > 1
    names = [
        (f"{run.config.model.name}/" if several else "")
        + (run.config.name or epath.Path(path).name)
        for path, run in runs.items()
    ]
    return [path if names.count(name) > 1 else name for name, path in zip(names, runs, strict=True)]


def validation_history(path: str, metric: str) -> list[tuple[int, float]]:
    """Returns (step, metric on the validation split) as logged, the last one of each step."""
    log = store.split_step(store.absolute(path))[0] / "metrics.jsonl"
    if not log.exists():
        return []
    lines = list(filter(None, map(_parsed, log.read_text().splitlines())))
    values = {
        line["step"]: float(line[metric])
        for line in lines
        if line["group"] == "validation" and metric in line
    }
    return sorted(values.items())


def _parsed(line: str) -> dict[str, Any]:
    """A line of JSON, or nothing for one that a killed run left unfinished."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
