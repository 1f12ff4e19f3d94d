"""Documents of JSON lines: an object a line, one of its keys the text."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from quantizable_flax.data.text.document import Document, Fields, labelled
from quantizable_flax.errors import UserError

# JSON is parsed a line at a time, which takes about twice the memory of the line.
MAX_JSON_CHARS = 1 << 28
_SURROGATES = re.compile("[\ud800-\udfff]")


def json_lines(
    stream: TextIO, path: Path, fields: Fields, max_chars: int = MAX_JSON_CHARS
) -> Iterator[Document]:
    """Yields the documents under `fields` of every line of a stream that is not blank.

    `path` is for the messages. Raises UserError, with the line named, for one of more than
    `max_chars` characters, with its end, and for one that is no object, without text or class.
    """
    number = 0
    while line := stream.readline(max_chars + 1):
        number += 1
        if line.isspace():
            continue
        if len(line) > max_chars:
            raise UserError(
                f"expected at most {max_chars} characters in {path}, line {number}, found more; "
                "cut the document into several"
            )
        document = _document(line, path, number, fields)
        del line  # Long ones are not kept while the document is used.
        if document.text:
            yield document


def _document(line: str, path: Path, number: int, fields: Fields) -> Document:
    where = f"{path}, line {number}"
    record = _record(line, where, first=number == 1)
    text = _text_of(record, where, fields.text).strip()
    # JSON escapes can spell lone surrogates, which no tokenizer takes.
    text = _SURROGATES.sub("?", text) if _SURROGATES.search(text) else text
    if fields.label is None or not text:
        return Document(text)
    if fields.label not in record:
        raise _no_key(record, where, fields.label, "label_key", "class")
    return labelled(text, record[fields.label], fields, where)


def _record(line: str, where: str, *, first: bool) -> dict[str, Any]:
    if first and line.lstrip().startswith("["):
        raise UserError(
            f"expected one JSON object a line in {where}, found an array; "
            "write each of its objects on a line of its own"
        )
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise UserError(
            f"expected one JSON object a line in {where}, found invalid JSON ({reason}); "
            "correct the line, or write the object on one"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"expected a JSON object in {where}, found {type(record).__name__}; correct the line"
        )
    return record


def _text_of(record: dict[str, Any], where: str, text_key: str) -> str:
    if text_key not in record:
        raise _no_key(record, where, text_key, "text_key", "text")
    if not isinstance(record[text_key], str):
        raise UserError(
            f"expected text under the key {text_key!r} in {where}, "
            f"found {type(record[text_key]).__name__}; set data.text_key to a key with text"
        )
    return record[text_key]


def _no_key(record: dict[str, Any], where: str, key: str, option: str, held: str) -> UserError:
    keys = ", ".join(sorted(record)) or "none"
    return UserError(
        f"expected the key {key!r} in {where}, found the keys {keys}; "
        f"set data.{option} to the one that holds the {held}"
    )
