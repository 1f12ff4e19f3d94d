"""Documents of a dataset of the Hugging Face hub, and of parquet files."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantizable_flax.data import hub
from quantizable_flax.data.hub import split_names
from quantizable_flax.errors import UserError, nearest

__all__ = ["describe", "documents", "parquet_documents", "split_names"]


def documents(name: str, split: str, text_key: str) -> Iterator[str]:
    """Returns an iterator over the texts of a split that are there and not blank, in its order.

    Raises UserError for a dataset, a split or a column that is not there, or one without text.
    """
    _check_key(hub.columns(name, split), text_key, f"the dataset {name}")
    source = hub.open_split(name, split, (text_key,))
    return _texts(source[index][text_key] for index in range(len(source)))


def describe(name: str, split: str, text_key: str) -> dict:
    """Returns what decides the documents, without reading them."""
    _check_key(hub.columns(name, split), text_key, f"the dataset {name}")
    return {**hub.describe_split(name, split), "text_key": text_key}


def parquet_documents(path: Path, text_key: str) -> Iterator[str]:
    """Yields the texts of a parquet file that are there and not blank, streamed.

    Raises UserError, with the file named, where the column is not there or has no text, and for a
    file that is damaged; OSError for one that must not be read.
    """
    try:
        _check_key(hub.parquet_columns(path), text_key, str(path))
        yield from _texts(hub.parquet_values(path, text_key))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"expected a whole parquet file in {path}, found it truncated or corrupt ({reason}); "
            "fetch or write it again"
        ) from None


def _texts(values: Iterable[str | None]) -> Iterator[str]:
    stripped = (value.strip() for value in values if value)
    return (text for text in stripped if text)


def _check_key(columns: Mapping[str, str], text_key: str, where: str) -> None:
    if text_key not in columns:
        raise UserError(
            f"expected the column {text_key!r} in {where}, found {', '.join(columns)}"
            f"{nearest(text_key, columns)}; set data.text_key to the one that holds the text"
        )
    if columns[text_key] != hub.TEXT:
        holding = [name for name, kind in columns.items() if kind == hub.TEXT]
        raise UserError(
            f"expected text in the column {text_key!r} of {where}, found {columns[text_key]}; "
            f"set data.text_key to a column with text: {', '.join(holding) or 'there is none'}"
        )
