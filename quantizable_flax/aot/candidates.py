"""The settings that a compilation ahead of time compares."""

import copy
import itertools
from typing import NamedTuple

from ml_collections import ConfigDict

from quantizable_flax.config import check_arguments, override
from quantizable_flax.errors import UserError


class Candidate(NamedTuple):
    """One thing to compile.

    Attributes:
      topology: as `v5e:16x16`.
      settings: by key, what is varied; `mesh` as the group is written on the command line.
      config: the whole configuration with them.
    """

    topology: str
    settings: dict[str, str]
    config: ConfigDict

    @property
    def label(self) -> str:
        """Topology and settings in a line."""
        return " ".join([self.topology, *(f"{k}={v}" for k, v in self.settings.items())])


def candidates(config: ConfigDict, topologies: list[str], vary: list[str]) -> list[Candidate]:
    """Returns every topology with every combination of values.

    Args:
      config: the recipe; it stays as it is.
      topologies: names.
      vary: `KEY=A,B,...` for a key, or `GROUP=KEY=A,KEY=B|...` for a group of keys as `mesh`.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    axes = [_axis(config, argument) for argument in vary]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--aot_vary={key} is given twice: write all its values in one.")
    found = []
    for topology, *values in itertools.product(topologies, *(values for _, values in axes)):
        settings = dict(zip(keys, values, strict=True))
        changed = copy.deepcopy(config)
        for key, value in settings.items():
            override(changed, _flags(config, key, value))
        found.append(Candidate(topology, settings, changed))
    return found


def _axis(config: ConfigDict, argument: str) -> tuple[str, list[str]]:
    key, equals, text = argument.partition("=")
    key = key.removeprefix("config.")
    check_arguments(config, [f"--config.{key}"])
    separator = "|" if _is_group(config, key) else ","
    values = [value.strip() for value in text.split(separator)]
    if not equals or not all(values):
        raise UserError(
            "--aot_vary must be a key and its values, as train.batch_size=256,512 or "
            f"'mesh=data=-1|fsdp=16,tensor=2', found {argument!r}."
        )
    return key, values


def _is_group(config: ConfigDict, key: str) -> bool:
    value = config
    for part in key.split("."):
        value = value.get(part)
    return isinstance(value, ConfigDict)


def _flags(config: ConfigDict, key: str, value: str) -> list[str]:
    if not _is_group(config, key):
        return [f"--config.{key}={value}"]
    return [f"--config.{key}.{part.strip()}" for part in value.split(",")]
