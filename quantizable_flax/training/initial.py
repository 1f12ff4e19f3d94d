"""Parameters of a new run from those of a finished model: `config.init_from`."""

import dataclasses
import json
from typing import Any

from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.data.kinds import IMAGES, images_have_labels, kind_of
from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.folder import is_published
from quantizable_flax.quantization.learned import without_grids
from quantizable_flax.training.finished import read_finished

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


def start_from(config: ConfigDict, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns the initial state with the parameters of `config.init_from`, and its assets.

    The assets are its tokenizer, which its embeddings belong to, and the names of its classes.
    With `model.attention.gate_finetune`, gates that it lacks stay as they are.

    Raises:
      UserError: nothing readable there, another architecture, or a parameter missing there, too
        many or of another shape.
    """

    def place(known: ConfigDict, shapes: Any) -> Any:
        _check_architecture(config, known)
        return _placed(config, shapes, state.params)

    try:
        _, params, assets = read_finished(config.init_from, place)
    except UserError as error:
        raise UserError(f"init_from={config.init_from}: {error}") from error
    ours = traverse_util.flatten_dict(state.params)
    theirs = traverse_util.flatten_dict(without_grids(params))
    merged = {name: theirs.get(name, value) for name, value in ours.items()}
    started = dataclasses.replace(state, params=traverse_util.unflatten_dict(merged))
    return started, assets


def for_data(config: ConfigDict, assets: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what the data side of a run takes of the assets that it starts with, None for none.

    Labelled images name their classes themselves, but for a distillation, which keeps the head.

    Raises:
      UserError: a published model of text without a tokenizer that we read.
    """
    if kind_of(config) == IMAGES:
        kept = config.distill.teacher and images_have_labels(config) and "classes" in assets
        return assets if kept else None
    if "tokenizer" in assets:
        return assets
    if is_published(config.init_from) and not config.data.tokenizer.file:
        raise UserError(
            f"init_from={config.init_from} has no tokenizer that can be read, and one that is "
            "trained anew would not fit its embeddings: set data.tokenizer.file."
        )
    return None


def _check_architecture(config: ConfigDict, saved: ConfigDict) -> None:
    ours, theirs = config.model.to_dict(), saved.model.to_dict()
    for key in ("name", *sorted(ours.keys() | theirs.keys())):
        if key in FREE_MODEL:
            continue
        before, after = (json.dumps(model.get(key)) for model in (theirs, ours))
        if before != after:
            raise UserError(
                f"it has model.{key}={before}, not {after}: start from one of the same "
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
        raise UserError(f"it has no parameter {'/'.join(missing[0])}{_more(missing)}{hint}.")
    if extra:
        raise UserError(
            f"it has a parameter {'/'.join(extra[0])} that this model lacks{_more(extra)}."
        )
    if other:
        name = other[0]
        raise UserError(
            f"its parameter {'/'.join(name)} has shape {tuple(theirs[name].shape)}, here it "
            f"is {tuple(ours[name].shape)}{_more(other)}."
        )
    shardings = {name: ours[name].sharding for name in theirs}
    # Grids that were learned there are read with the rest, and left.
    whole = NamedSharding(next(iter(shardings.values())).mesh, PartitionSpec())
    every = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({name: shardings.get(name, whole) for name in every})


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
