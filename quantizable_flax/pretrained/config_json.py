"""config.json of transformers as our configuration."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError, nearest
from quantizable_flax.pretrained.forms import FORMS, Form

FILE = "config.json"
OURS = "quantizable_flax"  # a key of ours in config.json: attention that transformers lacks
DEFAULT_CLASSES = 2  # of transformers, without id2label and num_labels
SHORT = 128  # tokens of an example, unless a command line says otherwise


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      UserError: it is missing, cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as JSON ({reason}): fetch it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold a JSON object, found {type(values).__name__}.")
    return values


def from_transformers(values: Mapping[str, Any], tensors: Iterable[str], origin: str) -> ConfigDict:
    """Returns the whole configuration of a model of transformers, `model` as published.

    Args:
      values: of its config.json.
      tensors: the names of its weights, which tell a pooler.
      origin: names the file in errors.

    Raises:
      UserError: an architecture or a setting that we do not compute, or a value of another type.
    """
    form = _form(values, origin)
    keys = _head(form, values, tensors, origin)
    config = default_config(form.family)
    if "num_classes" in config.model and keys.get("num_classes") != 0:
        keys["num_classes"] = count_classes(values)
    for key, wanted in form.fixed.items():
        found = values.get(key, wanted)
        if found != wanted:
            raise UserError(
                f"{origin} has {key}={json.dumps(found)}, where our {form.family} computes with "
                f"{json.dumps(wanted)} alone: take another model."
            )
    for name, (key, default) in form.fields.items():
        value = _value(name, values.get(name, default), origin)
        if key == "max_position_embeddings":
            value -= form.position_offset
        keys[key] = value
    if form.position_offset and keys["pad_token_id"] != form.position_offset - 1:
        raise UserError(
            f"{origin} has pad_token_id={json.dumps(keys['pad_token_id'])}, behind which positions "
            f"begin, where our {form.family} counts them from {form.position_offset}: take another "
            "model."
        )
    if keys.get("embed_size") == keys["hidden_size"]:
        keys["embed_size"] = None
    try:
        config.model.update(keys)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin} has a value of another type: {error}.") from error
    if "seq_len" in config.data:
        config.data.seq_len = min(SHORT, config.model.max_position_embeddings)
    _attention(config, values.get(OURS, {}), origin)
    return config


def class_names(values: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes in the order of the labels, None where they have no names."""
    names = _labels(values)
    known = [str(names[label]) for label in sorted(names, key=int)]
    invented = known == [f"LABEL_{label}" for label in range(len(known))]
    return None if invented or len(set(known)) < len(known) else known


def count_classes(values: Mapping[str, Any]) -> int:
    """How many classes there are."""
    return len(_labels(values)) or values.get("num_labels", DEFAULT_CLASSES)


def _labels(values: Mapping[str, Any]) -> Mapping[str, Any]:
    names = values.get("id2label")
    return names if isinstance(names, Mapping) else {}


def _form(values: Mapping[str, Any], origin: str) -> Form:
    kind = values.get("model_type")
    if kind not in FORMS:
        raise UserError(
            f"{origin} is of model_type={json.dumps(kind)}{nearest(str(kind), FORMS)}, expected "
            f"one of {', '.join(FORMS)}: take a model of those."
        )
    return FORMS[kind]


def _head(
    form: Form, values: Mapping[str, Any], tensors: Iterable[str], origin: str
) -> dict[str, Any]:
    names = values.get("architectures") or [f"{form.classes}Model"]
    suffix = str(names[0]).removeprefix(form.classes)
    found = [keys for known, keys in form.heads if known == suffix]
    if not found:
        raise UserError(
            f"{origin} is of the architecture {names[0]}, expected one of "
            f"{', '.join(form.architectures)}: take a model of those."
        )
    has_pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
    return dict(found[0] if has_pooler else found[-1])


def _value(name: str, value: Any, origin: str) -> Any:
    """A number; of images, height and width must be one."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{origin} has {name}={value}, expected a square: take another model.")
        return value[0]
    return value


def _attention(config: ConfigDict, ours: Any, origin: str) -> None:
    """What we noted when we wrote the file."""
    attention = ours.get("attention", {}) if isinstance(ours, Mapping) else {}
    apply_attention(config, attention, f"{OURS}.attention of {origin}")


def apply_attention(config: ConfigDict, attention: Mapping[str, Any], origin: str) -> None:
    """Sets keys of `config.model.attention`.

    Raises:
      UserError: a key that is none, or a value of another type.
    """
    for key, value in attention.items():
        if key not in config.model.attention:
            raise UserError(
                f"{origin} has the key {key!r}{nearest(key, config.model.attention.keys())}, "
                f"expected keys of model.attention: {', '.join(sorted(config.model.attention))}."
            )
        try:
            config.model.attention[key] = value
        except TypeError as error:
            raise UserError(f"{origin} has a value of another type: {error}.") from error
