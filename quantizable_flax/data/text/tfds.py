"""Documents of a TFDS dataset."""

import re
from collections.abc import Iterator

from quantizable_flax.data import tfds_source
from quantizable_flax.data.tfds_source import split_names
from quantizable_flax.errors import UserError, nearest

__all__ = ["describe", "documents", "split_names"]

_WIKI40B_MARKER = re.compile(r"\s*_START_(?:ARTICLE|SECTION|PARAGRAPH)_\s*")


def documents(name: str, split: str, data_dir: str | None, text_key: str) -> Iterator[str]:
    """Returns an iterator over the texts of a split that are not blank, in stored order.

    The markers of wiki40b become line breaks. Raises UserError for a dataset, a split or a
    feature that is not there.
    """
    _check_key(name, data_dir, text_key)
    source = tfds_source.open_split(name, split, data_dir, only=(text_key,))
    plain = _plain_wiki40b if re.split("[/:]", name)[0] == "wiki40b" else str.strip

    def texts() -> Iterator[str]:
        for index in range(len(source)):
            value = source[index][text_key]
            if not isinstance(value, bytes):
                raise UserError(
                    f"expected text under the feature {text_key!r} of the TFDS dataset {name}, "
                    f"found {type(value).__name__}; set data.text_key to a feature with text"
                )
            text = plain(value.decode("utf-8", "replace"))
            if text:
                yield text

    return texts()


def describe(name: str, split: str, data_dir: str | None, text_key: str) -> dict:
    """Returns what decides the documents, without reading them."""
    _check_key(name, data_dir, text_key)
    return {**tfds_source.describe_split(name, split, data_dir), "text_key": text_key}


def _check_key(name: str, data_dir: str | None, text_key: str) -> None:
    found = tfds_source.feature_names(name, data_dir)
    if text_key not in found:
        raise UserError(
            f"expected the feature {text_key!r} in the TFDS dataset {name}, found "
            f"{', '.join(found)}{nearest(text_key, found)}; set data.text_key to the one that "
            "holds the text"
        )


def _plain_wiki40b(text: str) -> str:
    return _WIKI40B_MARKER.sub("\n\n", text).replace("_NEWLINE_", "\n").strip()
