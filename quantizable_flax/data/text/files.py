"""Documents of local text: `.txt`, `.jsonl` or `.json`, plain or compressed."""

import bz2
import contextlib
import functools
import glob
import gzip
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from quantizable_flax.data.paths import matched
from quantizable_flax.data.text.pieces import word_end
from quantizable_flax.errors import UserError, nearest

# A text without blank lines, or without lines, must not end up in memory whole.
MAX_DOCUMENT_CHARS = 1 << 20
# JSON is parsed a line at a time, which takes about twice the memory of the line.
MAX_JSON_CHARS = 1 << 28
_OPENERS: dict[str, Callable] = {
    "": open,
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
_CORRUPT = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_SURROGATES = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)


def expand(patterns: str, option: str) -> list[Path]:
    """Returns the files that comma-separated paths or globs name, in order, each once.

    `option` is the name of the configuration field, for the messages. Raises UserError for a
    pattern that matches no file, a missing file, a directory and an unknown extension.
    """
    paths: dict[Path, None] = {}
    for pattern, matches in matched(patterns):
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            is_directory = os.path.isdir(os.path.expanduser(pattern))
            raise UserError(_no_match(pattern, option, is_directory=is_directory))
        paths.update(dict.fromkeys(files))
    if not paths:
        raise UserError(
            f"expected paths or globs separated by commas in {option}, found {patterns!r}; "
            "name at least one file"
        )
    for path in paths:
        _reader(path)
    return list(paths)


def _no_match(pattern: str, option: str, *, is_directory: bool) -> str:
    if is_directory:
        return (
            f"expected files in {option}, found the directory {pattern}; "
            f"use a glob such as {pattern.rstrip('/')}/*.jsonl"
        )
    if glob.has_magic(pattern):
        return f"expected files that match {pattern!r} in {option}, found none; correct the glob"
    return f"expected the file {pattern} of {option}, found nothing there; correct the path"


def read_documents(paths: list[Path], text_key: str) -> Iterator[str]:
    """Yields the documents of each file in turn, streamed.

    A `.txt` holds documents separated by blank lines; a `.jsonl` or `.json` holds one JSON object
    a line, whose `text_key` is the document. Files without documents are passed over with a
    warning. Raises UserError, with the file named, for whatever cannot be read, and where no file
    has a document.
    """
    empty = []
    for path in paths:
        found = False
        for text in _documents(path, text_key):
            found = True
            yield text
        if not found:
            empty.append(path)
    if empty and len(empty) == len(paths):
        others = f" nor in {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(
            f"expected text in {empty[0]}, found no document there{others}; name files with text"
        )
    if empty:
        _warn_empty(str(empty[0]), len(empty), len(paths))


@functools.cache  # Several passes over the same files say it once.
def _warn_empty(first: str, count: int, total: int) -> None:
    _log.warning(
        "%d of %d text files hold no document and are passed over, the first is %s",
        count,
        total,
        first,
    )


def _documents(path: Path, text_key: str) -> Iterator[str]:
    opener, reader = _reader(path)
    with _explained(path):
        if not path.stat().st_size:  # Not every format of compression can be empty.
            return
        # utf-8-sig also reads plain UTF-8; it drops the byte-order mark of some editors.
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            yield from reader(stream, path, text_key)


def _reader(path: Path) -> tuple[Callable, Callable[[TextIO, Path, str], Iterator[str]]]:
    stem, suffix = os.path.splitext(path.name.lower())
    compression = suffix if suffix in _OPENERS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix not in _READERS:
        raise UserError(
            f"expected a file that ends in one of {', '.join(_READERS)}, as it is or with one of "
            f"{', '.join(filter(None, _OPENERS))} behind, found {path}; convert or rename it"
            f"{nearest(suffix, _READERS) if suffix else ''}"
        )
    return _OPENERS[compression], _READERS[suffix]


def _paragraphs(stream: TextIO, path: Path, text_key: str) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in _bounded_lines(stream):
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > MAX_DOCUMENT_CHARS):
            yield "".join(lines).strip()
            lines, length = [], 0
    if lines:
        yield "".join(lines).strip()


def _bounded_lines(stream: TextIO) -> Iterator[str]:
    """Yields the lines, those of MAX_DOCUMENT_CHARS or more in parts that end between words."""
    rest = ""
    while line := stream.readline(MAX_DOCUMENT_CHARS):
        whole = line.endswith("\n") or len(line) < MAX_DOCUMENT_CHARS
        line = rest + line
        end = len(line) if whole else word_end(line)
        rest = line[end:]
        yield line[:end]
    if rest:
        yield rest


def _json_lines(stream: TextIO, path: Path, text_key: str) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_JSON_CHARS + 1):
        number += 1
        if line.isspace():
            continue
        text = _text_of(line, path, number, text_key).strip()
        del line  # Long ones are not kept while the document is used.
        if text:
            # JSON escapes can spell lone surrogates, which no tokenizer takes.
            yield _SURROGATES.sub("?", text) if _SURROGATES.search(text) else text


def _text_of(line: str, path: Path, number: int, text_key: str) -> str:
    where = f"{path}, line {number}"
    if len(line) > MAX_JSON_CHARS:
        raise UserError(
            f"expected at most {MAX_JSON_CHARS} characters in {where}, found more; "
            "cut the document into several"
        )
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


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {path}, found a byte that is not ({error.reason}); "
            "convert the file to UTF-8"
        ) from None
    except _CORRUPT as error:
        raise _corrupt(path, error) from None
    except OSError as error:
        if error.errno is None:  # As bz2 says that a file is none of its own.
            raise _corrupt(path, error) from None
        raise UserError(
            f"expected a readable file in {path}, found '{error.strerror or error}'; "
            "correct the path or its permissions"
        ) from None


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(
        f"expected a whole {path.suffix} file in {path}, found it truncated or corrupt "
        f"({error}); fetch or compress it again"
    )


_READERS: dict[str, Callable[[TextIO, Path, str], Iterator[str]]] = {
    ".txt": _paragraphs,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".ndjson": _json_lines,
}
