"""The configuration: every key with its default, variants, overrides, and the checks on them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_flags import config_flags

from quantizable_flax.config.defaults import FAMILIES, family_keys
from quantizable_flax.config.keys import to_config
from quantizable_flax.config.migration import migrated, name_of_now
from quantizable_flax.errors import UserError, check_at_least, check_choice, nearest

UNSET = "None"  # on the command line, of a key that may be unset
_NO_TUPLE = (None,)  # what ml_collections makes of it where a tuple is expected


class _Parser(flags.ArgumentParser):
    """Reads a value as another parser does, and None where it is to be unset."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument == UNSET else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


# ml_collections knows one parser a type, not whether a key is optional: see `check_set`.
for _type, _parser in (
    (bool, flags.BooleanParser()),
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (str, flags.ArgumentParser()),
):
    config_flags.register_flag_parser_for_type(_type, _Parser(_parser))


def default_config(family: str = "bert") -> ConfigDict:
    """Returns every key that a recipe of the family may set; unset ones are typed placeholders.

    Args:
      family: "bert", "opt", "vit" or one that was registered; it decides the keys of `model` and
        `data`.

    Raises:
      UserError: another family.
    """
    check_choice("model.name", family, FAMILIES)
    config = to_config(family_keys(family))
    config.quant.coverage = FAMILIES[family].config.coverage
    return config


def apply_variant(
    config: ConfigDict, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Runs the named variant's change on config and returns it.

    Raises:
      UserError: the variant is not one of `variants`.
    """
    check_choice("the variant after the colon", variant, variants)
    variants[variant](config)
    return config


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON, unset keys as null."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Rebuilds a typed configuration from `json.loads(to_json(config))`.

    What an older version wrote is migrated; keys that it lacks get their defaults.

    Raises:
      UserError: a key that this version does not know, or a value of another type.
    """
    values = migrated(values)
    model = values.get("model")
    config = default_config(model.get("name", "bert") if isinstance(model, Mapping) else "bert")
    check_keys(config, values)
    try:
        config.update(values)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the stored configuration has a value of another type: {error}."
        ) from error
    return config


def check_keys(config: ConfigDict, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError for the first key of values that config does not have."""
    for key, value in values.items():
        if key not in config:
            raise UserError(
                f"unknown configuration key {prefix}{key}{nearest(key, config.keys())}."
            )
        if isinstance(config.get(key), ConfigDict):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key} is a group of keys, found the value {value!r}.")
            check_keys(config[key], value, f"{prefix}{key}.")


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Applies `--config.a.b=value` arguments to config in place and returns it.

    Raises:
      UserError: unknown key or a value of the wrong type.
    """
    check_arguments(config, arguments)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["override", *arguments]
    )
    try:
        values(["override", *arguments])
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"a configuration override could not be read: {error}") from error
    check_set(config)
    return config


def check_arguments(config: ConfigDict, arguments: list[str]) -> None:
    """Raises UserError, with the nearest valid name, if a `--config.a.b` key does not exist."""
    for argument in arguments:
        path = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not path.startswith("config."):
            continue
        group = config
        for key in path.split(".")[1:]:
            if not isinstance(group, ConfigDict) or key not in group:
                known = list(group.keys()) if isinstance(group, ConfigDict) else []
                raise UserError(_unknown(path.removeprefix("config."), key, known))
            group = group.get(key)


def _unknown(path: str, key: str, known: list[str]) -> str:
    valid = f"; valid here: {', '.join(sorted(known))}" if known else ""
    return f"unknown configuration key {path}{name_of_now(path) or nearest(key, known) or valid}."


def check_set(config: ConfigDict) -> None:
    """Raises UserError for the first key that is None and no placeholder: it must have a value."""
    name = config.get("model", {}).get("name")
    _check_group(config, default_config(name) if name in FAMILIES else ConfigDict(), "")


def _check_group(group: ConfigDict, defaults: ConfigDict, prefix: str) -> None:
    for key, value in group.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            _check_group(value, defaults.get(key, ConfigDict()), f"{prefix}{key}.")
        elif isinstance(value, FieldReference):
            if value.get() == _NO_TUPLE:
                group[key] = None
        elif value is None or value == _NO_TUPLE:
            known = f", the default is {defaults[key]!r}" if key in defaults else ""
            raise UserError(f"{prefix}{key} cannot be unset, found None: give it a value{known}.")


POSITIVE = ("train.steps", "train.log_every", "checkpoint.every", "checkpoint.keep")


def check_positive(config: ConfigDict) -> None:
    """Raises UserError if a count that must be at least 1 is not, or no saved step is kept."""
    for path in POSITIVE:
        group, key = path.split(".")
        check_at_least(1, path, config[group][key])
    every, kept = config.checkpoint.every, config.checkpoint.keep_every
    if kept < 0 or kept % every:
        raise UserError(
            f"checkpoint.keep_every must be 0 or a multiple of checkpoint.every={every}, found "
            f"{kept}: other steps are not saved."
        )
