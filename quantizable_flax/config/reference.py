"""Prints docs/configuration.md: python -m quantizable_flax.config.reference (`make docs`)."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from quantizable_flax.config import default_config
from quantizable_flax.config.defaults import FAMILIES, family_keys
from quantizable_flax.config.keys import flattened

INTRODUCTION = """\
# Configuration

<!-- Made by `make docs` from what stands beside each key in quantizable_flax: change it there. -->

Every key of `config`. A command line sets one by `--config.KEY=VALUE`, and `--config.KEY=None`
unsets one whose type says so; a recipe sets it in Python, `config.KEY = VALUE`. Defaults are those
of `default_config(family)`; recipes set what was published.

What all families share comes first, then of each family what it alone has or starts from. How keys
work together is on the pages about [training](training.md), [data](data.md),
[quantization](quantization.md) and [devices](devices.md)."""


class Row(NamedTuple):
    """A key as it stands in a table."""

    key: str
    default: str
    type: str
    meaning: str


def rows(family: str) -> list[Row]:
    """Every key of a family, in the order in which it was written down."""
    meanings = {path: key.meaning for path, key in flattened(family_keys(family))}
    values = dict(_values(default_config(family)))
    return [Row(path, *_shown(values[path]), text) for path, text in meanings.items()]


def _values(group: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value, or reference of one that may be None) of every key."""
    for key, value in group.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> tuple[str, str]:
    """A default and its type, as a table shows them."""
    if isinstance(value, FieldReference):
        return _literal(value.get()), f"{value.get_type().__name__} or None"
    return _literal(value), type(value).__name__


def _literal(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, float):
        return f"{value:.4g}" if len(repr(value)) > 8 else repr(value)
    return value if isinstance(value, str) and value else repr(value)


def page() -> str:
    """The whole page."""
    by_family = {family: rows(family) for family in FAMILIES}
    first, *others = by_family.values()
    shared = [row for row in first if all(row in other for other in others)]
    known = {row.key for found in by_family.values() for row in found}
    parts = [INTRODUCTION]
    for group in dict.fromkeys(map(_group, shared)):
        table = [row for row in shared if _group(row) == group]
        parts += [f"## {f'`{group}`' if group else 'The run'}", _table(table, known)]
    for family, found in by_family.items():
        own = [row for row in found if row not in shared]
        parts += [f"## Family `{family}`", _summary(FAMILIES[family].config), _table(own, known)]
    return "\n\n".join(parts) + "\n"


def _group(row: Row) -> str:
    return row.key.rpartition(".")[0].partition(".")[0]


def _summary(owner: Callable[..., Any]) -> str:
    return (owner.__doc__ or "").partition("\n")[0]


def _table(table: Iterable[Row], known: set[str]) -> str:
    lines = ["| key | default | type | meaning |", "|---|---|---|---|"]
    for key, default, kind, meaning in table:
        lines.append(f"| `{key}` | `{default}` | {kind} | {_marked(meaning, known)} |")
    return "\n".join(lines)


def _marked(text: str, known: set[str]) -> str:
    """The text with what one types as code: words in double quotes, and whole paths of keys."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        plain = re.sub(r'"([^"]+)"', r"`\1`", parts[index])
        parts[index] = re.sub(
            r"(?<![\w.`])\w+(\.\w+)+(?![\w`])",
            lambda found: f"`{found[0]}`" if found[0] in known else found[0],
            plain,
        )
    return "`".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
