"""Documents of a TFDS dataset."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from quantizable_flax.data import tfds_source
from quantizable_flax.data.text.document import Document, Fields, labelled, spoken
from quantizable_flax.data.tfds_source import split_names
from quantizable_flax.errors import UserError, nearest

__all__ = ["classes", "describe", "documents", "split_names"]

_WIKI40B_MARKER = re.compile(r"\s*_START_(?:ARTICLE|SECTION|PARAGRAPH)_\s*")


def documents(name: str, split: str, data_dir: str | None, fields: Fields) -> Iterator[Document]:
    """Returns an iterator over the examples of a split whose text is not blank, in stored order.

    The markers of wiki40b become line breaks. Raises UserError for a dataset, a split or a
    feature that is not there.
    """
    names = classes(name, split, data_dir, fields)
    only = [key for key in dict.fromkeys(fields) if key is not None]
    source = tfds_source.open_split(name, split, data_dir, only=only)
    plain = _plain_wiki40b if re.split("[/:]", name)[0] == "wiki40b" else str.strip

    def found() -> Iterator[Document]:
        for index in range(len(source)):
            example = source[index]
            text = plain(_text_of(example[fields.text], name, fields.text))
            if text and fields.label is None:
                yield Document(text)
            elif text:
                place = f"example {index} of the {split} split of the TFDS dataset {name}"
                label = example[fields.label]
                label = label.decode("utf-8", "replace") if isinstance(label, bytes) else label
                yield labelled(text, label, fields, place, names)

    return found()


def classes(name: str, split: str, data_dir: str | None, fields: Fields) -> Sequence[str] | None:
    """Returns the names of the classes, None where the dataset does not declare them.

    Raises UserError for a dataset or a feature that is not there.
    """
    _check_keys(name, data_dir, fields)
    if fields.label is None:
        return None
    return spoken(tfds_source.class_names(name, data_dir, fields.label))


def describe(name: str, split: str, data_dir: str | None, fields: Fields) -> dict:
    """Returns what decides the documents, without reading them."""
    _check_keys(name, data_dir, fields)
    return {**tfds_source.describe_split(name, split, data_dir), **fields.description}


def _text_of(value: Any, name: str, text_key: str) -> str:
    if not isinstance(value, bytes):
        raise UserError(
            f"expected text under the feature {text_key!r} of the TFDS dataset {name}, "
            f"found {type(value).__name__}; set data.text_key to a feature with text"
        )
    return value.decode("utf-8", "replace")


def _check_keys(name: str, data_dir: str | None, fields: Fields) -> None:
    found = tfds_source.feature_names(name, data_dir)
    for key, option, held in (
        (fields.text, "text_key", "text"),
        (fields.label, "label_key", "class"),
    ):
        if key is not None and key not in found:
            raise UserError(
                f"expected the feature {key!r} in the TFDS dataset {name}, found "
                f"{', '.join(found)}{nearest(key, found)}; set data.{option} to the one that "
                f"holds the {held}"
            )


def _plain_wiki40b(text: str) -> str:
    return _WIKI40B_MARKER.sub("\n\n", text).replace("_NEWLINE_", "\n").strip()
