"""Documents of a dataset of the Hugging Face hub, and of parquet files."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantizable_flax.data import hub
from quantizable_flax.data.hub import split_names
from quantizable_flax.data.text.document import Document, Fields, labelled, spoken
from quantizable_flax.errors import UserError, nearest

__all__ = ["classes", "describe", "documents", "parquet_documents", "split_names"]

_HOLDS = {
    "text_key": ("text", (hub.TEXT,)),
    "label_key": ("class", (hub.CLASS, hub.INTEGER, hub.TEXT)),
}


def documents(name: str, split: str, fields: Fields) -> Iterator[Document]:
    """Returns an iterator over the rows of a split whose text is there and not blank, in its order.

    Raises UserError for a dataset, a split or a column that is not there, or one without text or
    classes.
    """
    names = classes(name, split, fields)
    source = hub.open_split(name, split, _columns(fields))
    rows = (source[index] for index in range(len(source)))
    return _documents(rows, fields, names, f"of the {split} split of the dataset {name}")


def classes(name: str, split: str, fields: Fields) -> Sequence[str] | None:
    """Returns the names of the classes, None where the dataset does not declare them.

    Raises UserError as `documents`.
    """
    _check_keys(hub.columns(name, split), fields, f"the dataset {name}")
    return None if fields.label is None else spoken(hub.class_names(name, split, fields.label))


def describe(name: str, split: str, fields: Fields) -> dict:
    """Returns what decides the documents, without reading them."""
    _check_keys(hub.columns(name, split), fields, f"the dataset {name}")
    return {**hub.describe_split(name, split), **fields.description}


def parquet_documents(path: Path, fields: Fields) -> Iterator[Document]:
    """Yields the rows of a parquet file whose text is there and not blank, streamed.

    Raises UserError, with the file named, where a column is not there or has no text or classes,
    and for a file that is damaged; OSError for one that must not be read.
    """
    names = parquet_classes(path, fields)
    with _whole(path):
        yield from _documents(hub.parquet_rows(path, _columns(fields)), fields, names, f"of {path}")


def parquet_classes(path: Path, fields: Fields) -> Sequence[str] | None:
    """Returns the names of the classes, None where the file does not declare them.

    Raises UserError and OSError as `parquet_documents`.
    """
    with _whole(path):
        _check_keys(hub.parquet_columns(path), fields, str(path))
        return None if fields.label is None else spoken(hub.parquet_class_names(path, fields.label))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"expected a whole parquet file in {path}, found it truncated or corrupt ({reason}); "
            "fetch or write it again"
        ) from None


def _columns(fields: Fields) -> list[str]:
    return [key for key in dict.fromkeys(fields) if key is not None]


def _documents(
    rows: Iterable[Mapping[str, Any]], fields: Fields, names: Sequence[str] | None, where: str
) -> Iterator[Document]:
    for number, row in enumerate(rows):
        text = (row[fields.text] or "").strip()
        if not text:
            continue
        if fields.label is None:
            yield Document(text)
        else:
            yield labelled(text, row[fields.label], fields, f"row {number} {where}", names)


def _check_keys(columns: Mapping[str, str], fields: Fields, where: str) -> None:
    for option, key in (("text_key", fields.text), ("label_key", fields.label)):
        if key is not None:
            _check_key(columns, key, option, where)


def _check_key(columns: Mapping[str, str], key: str, option: str, where: str) -> None:
    held, kinds = _HOLDS[option]
    if key not in columns:
        raise UserError(
            f"expected the column {key!r} in {where}, found {', '.join(columns)}"
            f"{nearest(key, columns)}; set data.{option} to the one that holds the {held}"
        )
    if columns[key] not in kinds:
        holding = [name for name, kind in columns.items() if kind in kinds]
        raise UserError(
            f"expected {' or '.join(kinds)} in the column {key!r} of {where}, found {columns[key]};"
            f" set data.{option} to a column with {held}: "
            f"{', '.join(holding) or 'there is none'}"
        )
