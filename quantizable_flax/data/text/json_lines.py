"""Documents of JSON lines: an object a line, one of its keys the text."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from quantizable_flax.errors import UserError

# JSON is parsed a line at a time, which takes about twice the memory of the line.
MAX_JSON_CHARS = 1 << 28
_SURROGATES = re.compile("[\ud800-\udfff]")


def json_lines(
    stream: TextIO, path: Path, text_key: str, max_chars: int = MAX_JSON_CHARS
) -> Iterator[str]:
    """Yields the text under `text_key` of every line of a stream that is not blank.

    `path` is for the messages. Raises UserError, with the line named, for one of more than
    `max_chars` characters, with its end, and for one that is no object or without text.
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
        text = _text_of(line, path, number, text_key).strip()
        del line  # Long ones are not kept while the document is used.
        if text:
            # JSON escapes can spell lone surrogates, which no tokenizer takes.
            yield _SURROGATES.sub("?", text) if _SURROGATES.search(text) else text


def _text_of(line: str, path: Path, number: int, text_key: str) -> str:
    where = f"{path}, line {number}"
    if number == 1 and line.lstrip().startswith("["):
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
    if text_key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise UserError(
            f"expected the key {text_key!r} in {where}, found the keys {keys}; "
            "set data.text_key to the one that holds the text"
        )
    if not isinstance(record[text_key], str):
        raise UserError(
            f"expected text under the key {text_key!r} in {where}, "
            f"found {type(record[text_key]).__name__}; set data.text_key to a key with text"
        )
    return record[text_key]
