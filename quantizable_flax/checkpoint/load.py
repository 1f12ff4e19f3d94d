"""A trained run, or a published model, as a model and its parameters, from the path alone."""

import os
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
from quantizable_flax.pretrained.folder import HUB, is_published, read_folder
from quantizable_flax.ptq.trained import trained_model, trained_spec
from quantizable_flax.quantization.spec import QuantSpec


class Run(NamedTuple):
    """What a workdir holds.

    Attributes:
      config: of the training run.
      model: the Linen module.
      params: its parameters, float32, on this process's first device.
      assets: saved with the run: its tokenizer, or the names of its classes.
      info: `step`, `train_seconds`, `versions`; of an INT8 model `quant`, its scheme; of a
        published model `published`, where it lies.
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


def load(path: str | os.PathLike) -> tuple[nn.Module, Any]:
    """Returns (model, params) of the newest readable checkpoint of a run.

    Args:
      path: the workdir of a run, the folder of one step in its `checkpoints/`, or what
        `quantizable_flax.export` wrote: that model runs on integers. The folder of a published
        model is read as by `from_pretrained`, and so is `hf:org/name`.

    Raises:
      UserError: no checkpoint there, or none that can be read.
    """
    run = load_run(os.fspath(path))
    return run.model, run.params


def load_run(path: str) -> Run:
    """As `load`, with configuration, assets and notes."""
    if is_published(path):
        found = read_folder(path)
        info = {"step": 0, "train_seconds": 0.0, "versions": {}, "published": path}
        return Run(*found, info)

    def read(workdir, step: int) -> Run:
        notes = store.read_notes(workdir, step)
        config = configuration.from_dict(notes.config)
        params = store.restore_params(workdir, step)
        ranges = store.restore_ranges(workdir, step)
        model, spec = _model(config, notes.info), trained_spec(config)
        return Run(config, model, params, notes.assets, notes.info, ranges, spec)

    return resume.read_path(existing(path), read)


def existing(path: str) -> epath.Path:
    """The path of a folder made absolute.

    Raises:
      UserError: nothing is there, or a file.
    """
    found = store.absolute(path)
    wrong = "does not exist" if not found.exists() else "is a file" if found.is_file() else None
    if wrong:
        raise UserError(
            f"{path} {wrong}: give a run's workdir, the folder of a published model, or "
            f"{HUB}org/name."
        )
    return found


def _model(config: ConfigDict, info: Mapping[str, Any]) -> nn.Module:
    """The run's model; one that was exported computes on integers, and in float32 between."""
    if "quant" not in info:
        return trained_model(config)
    model = build_model(config)
    return with_quant(with_config(model, dtype=jnp.float32), QuantSpec.from_dict(info["quant"]))


# What the files of a published model do not say, and no parameter depends on.
UNSAID = (
    *("softmax", "gamma", "zeta", "alpha", "length_normalised"),
    *("gate_pooling", "gate_finetune", "gate_pi_init"),
)


def override_run(run: Run, arguments: list[str]) -> Run:
    """Returns the run with `--config.a.b=value` arguments applied to its configuration, in place.

    Other `data.files` come without the run's own validation files.

    Raises:
      UserError: as `config.override`, or a key of the model, which is trained already; of a
        published one, what its attention was trained with may be said.
    """
    keys = [argument.lstrip("-").partition("=")[0] for argument in arguments]
    free = [f"config.model.attention.{key}" for key in UNSAID] if "published" in run.info else []
    for key in keys:
        if key.startswith("config.model.") and key not in free:
            raise UserError(f"--{key} cannot be changed: the model is trained already.")
    if "config.data.files" in keys:
        run.config.data.source = "auto"
        run.config.data.validation_files = None
    configuration.override(run.config, arguments)
    return run._replace(model=build_model(run.config)) if any(k in free for k in keys) else run


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
