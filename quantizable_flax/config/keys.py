"""What a configuration key is: a default, and what it means in a line.

What a model, its attention or a quantization scheme is made of is said once, by the dataclass (or
the function's arguments) that takes it, default and meaning: those keys are derived.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict, config_dict

_SECTION = re.compile(r"^(?:Attributes|Args):\n((?:[ ]+.*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^  (\w[\w, ]*): ((?:.+\n?)(?:    .+\n?|\n(?=    ))*)", re.MULTILINE)


class Key(NamedTuple):
    """A key.

    Attributes:
      default: its value unless a recipe sets another.
      meaning: a line for docs/configuration.md, with its values in quotes where they are words.
      optional: its type, if it may be None.
    """

    default: Any
    meaning: str
    optional: type | None = None


Keys: TypeAlias = "Mapping[str, Key | Keys]"


def to_config(keys: Keys) -> ConfigDict:
    """Returns the defaults.

    A key that may be None is a placeholder of its type, so that a command line can set and unset
    it.
    """
    config = ConfigDict()
    for name, key in keys.items():
        if not isinstance(key, Key):
            config[name] = to_config(key)
        elif key.optional is None:
            config[name] = key.default
        else:
            reference = config_dict.placeholder(key.optional)
            reference.set(key.default)
            config[name] = reference
    return config


def flattened(keys: Keys, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yields (path, key) of every key in the groups."""
    for name, key in keys.items():
        if isinstance(key, Key):
            yield prefix + name, key
        else:
            yield from flattened(key, f"{prefix}{name}.")


def derived(owner: Callable[..., Any], names: Iterable[str], *, prefix: str = "") -> dict[str, Key]:
    """One key for each of the named arguments of a dataclass or function, as it documents them."""
    parameters = inspect.signature(owner).parameters
    hints = typing.get_type_hints(owner)
    keys = {}
    for name in names:
        kinds = set(typing.get_args(hints[name]))
        optional = None
        if types.NoneType in kinds:
            (optional,) = kinds - {types.NoneType}
        keys[prefix + name] = Key(parameters[name].default, meaning(owner, name), optional)
    return keys


def meaning(owner: Callable[..., Any], name: str) -> str:
    """What the docstring of a function, of a class or of one that it derives from says of a name.

    An empty text where none does.
    """
    for parent in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        if found := _documented(parent).get(name):
            return found
    return ""


@functools.cache
def _documented(owner: Callable[..., Any]) -> dict[str, str]:
    """The entries of `Attributes:` or `Args:`; one entry may be of several names."""
    section = _SECTION.search(inspect.cleandoc(owner.__doc__ or "") + "\n")
    entries = _ENTRY.findall(section[1]) if section else []
    return {
        name: " ".join(text.split()).removesuffix(".")
        for names, text in entries
        for name in names.split(", ")
    }
