"""A trained run as a model and its parameters, from the path alone."""

import json
from typing import Any, NamedTuple

import flax.linen as nn
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.data.tokenizer import Tokenizer
from quantizable_flax.models.registry import build_model
from quantizable_flax.training import checkpoint, resume


class Run(NamedTuple):
    """What a workdir holds.

    Attributes:
      config: of the training run.
      model: the Linen module.
      params: its parameters, float32, on this process's first device.
      tokenizer: saved with the run.
      info: `step`, `train_seconds`, `versions`.
    """

    config: ConfigDict
    model: nn.Module
    params: Any
    tokenizer: Tokenizer
    info: dict[str, Any]


def load(path: str) -> tuple[nn.Module, Any]:
    """Returns (model, params) of the newest readable checkpoint of a run.

    Args:
      path: the workdir of a run, or the folder of one step in its `checkpoints/`.

    Raises:
      UserError: no checkpoint there, or none that can be read.
    """
    run = load_run(path)
    return run.model, run.params


def load_run(path: str) -> Run:
    """As `load`, with configuration, tokenizer and notes."""
    workdir, wanted = _split_step(checkpoint.absolute(path))

    def read(step: int) -> Run:
        notes = checkpoint.read_notes(workdir, step)
        config = configuration.from_dict(notes.config)
        tokenizer = Tokenizer.from_json(json.dumps(notes.tokenizer), origin="the checkpoint")
        params = checkpoint.restore_params(workdir, step)
        return Run(config, build_model(config), params, tokenizer, notes.info)

    if wanted is not None:
        return resume.read_step(workdir, wanted, read)
    _, run, _ = resume.newest_readable(workdir, read)
    return run


def validation_history(path: str) -> list[tuple[int, float]]:
    """Returns (step, validation perplexity) as the run logged them, the last one of each step."""
    log = _split_step(checkpoint.absolute(path))[0] / "metrics.jsonl"
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    values = {
        line["step"]: float(line["perplexity"]) for line in lines if line["group"] == "validation"
    }
    return sorted(values.items())


def _split_step(path: epath.Path) -> tuple[epath.Path, int | None]:
    if path.name.isdigit() and path.parent.name == checkpoint.FOLDER:
        return path.parent.parent, int(path.name)
    return path, None
