"""Parameters of a new run from those of another: `config.init_from`."""

import dataclasses
import json
from typing import Any

from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.checkpoint import resume, store
from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.errors import UserError
from quantizable_flax.quantization.learned import without_grids

# Keys of `model` that may change with a new run: no parameter means anything else by them.
# `attention` may too: gates show as parameters, and to clip a softmax is what one fine-tunes for.
FREE_MODEL = (
    "attention",
    "hidden_dropout",
    "attention_dropout",
    "dtype",
    "initializer_range",
    "max_predictions",
    "label_smoothing",
    "mixup_alpha",
    "cutmix_alpha",
    "mix_probability",
    "cutmix_share",
)


def start_from(config: ConfigDict, state: TrainState) -> tuple[TrainState, dict[str, Any] | None]:
    """Returns the initial state with the parameters of `config.init_from`, and its assets.

    The assets are its tokenizer, which its embeddings belong to; None for images, where the data
    name the classes. With `model.attention.gate_finetune`, gates that it lacks stay as they are.

    Raises:
      UserError: nothing readable there, another architecture, or a parameter missing there, too
        many or of another shape.
    """
    path = store.absolute(config.init_from)
    if not path.exists():
        raise UserError(f"init_from={config.init_from} does not exist: give a run's workdir.")

    def read(workdir, step: int):
        notes = store.read_notes(workdir, step)
        resume.check_trainable(notes.info, workdir)
        _check_architecture(config, configuration.from_dict(notes.config))
        params = store.restore_params(
            workdir, step, lambda shapes: _placed(config, shapes, state.params)
        )
        return params, notes.assets

    try:
        params, assets = resume.read_path(path, read)
    except UserError as error:
        raise UserError(f"init_from={config.init_from}: {error}") from error
    ours = traverse_util.flatten_dict(state.params)
    theirs = traverse_util.flatten_dict(without_grids(params))
    merged = {name: theirs.get(name, value) for name, value in ours.items()}
    started = dataclasses.replace(state, params=traverse_util.unflatten_dict(merged))
    return started, assets if "tokenizer" in assets else None


def _check_architecture(config: ConfigDict, saved: ConfigDict) -> None:
    ours, theirs = config.model.to_dict(), saved.model.to_dict()
    for key in ("name", *sorted(ours.keys() | theirs.keys())):
        if key in FREE_MODEL:
            continue
        before, after = (json.dumps(model.get(key)) for model in (theirs, ours))
        if before != after:
            raise UserError(
                f"that run has model.{key}={before}, not {after}: start from a run of the same "
                "architecture."
            )


def _placed(config: ConfigDict, shapes: Any, params: Any) -> Any:
    """The shardings of the parameters there, as those here have them; checks that both agree."""
    ours = traverse_util.flatten_dict(without_grids(params))
    theirs = traverse_util.flatten_dict(without_grids(shapes))
    gates_may_lack = config.model.attention.gate_finetune
    missing = [
        name for name in ours if name not in theirs and not ("gate" in name and gates_may_lack)
    ]
    extra = [name for name in theirs if name not in ours]
    other = [name for name in theirs if name in ours and theirs[name].shape != ours[name].shape]
    if missing:
        hint = "; set model.attention.gate_finetune to add gates" if "gate" in missing[0] else ""
        raise UserError(f"that run has no parameter {'/'.join(missing[0])}{_more(missing)}{hint}.")
    if extra:
        raise UserError(
            f"that run has a parameter {'/'.join(extra[0])} that this model lacks{_more(extra)}."
        )
    if other:
        name = other[0]
        raise UserError(
            f"that run's parameter {'/'.join(name)} has shape {tuple(theirs[name].shape)}, here it "
            f"is {tuple(ours[name].shape)}{_more(other)}."
        )
    shardings = {name: ours[name].sharding for name in theirs}
    # Grids that were learned there are read with the rest, and left.
    whole = NamedSharding(next(iter(shardings.values())).mesh, PartitionSpec())
    every = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({name: shardings.get(name, whole) for name in every})


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
