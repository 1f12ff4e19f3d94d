"""Documents of local files: `.txt`, `.jsonl` or `.json`, plain or compressed, and `.parquet`."""

import bz2
import contextlib
import functools
import glob
import gzip
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from quantizable_flax.data.paths import matched
from quantizable_flax.data.text.document import Document, Fields
from quantizable_flax.data.text.hub import parquet_classes, parquet_documents
from quantizable_flax.data.text.json_lines import json_lines
from quantizable_flax.data.text.pieces import word_end
from quantizable_flax.errors import UserError, nearest

# A text without blank lines, or without lines, must not end up in memory whole.
MAX_DOCUMENT_CHARS = 1 << 20
_OPENERS: dict[str, Callable] = {
    "": open,
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
_PARQUET = ".parquet"
_CORRUPT = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
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


def read_documents(paths: list[Path], fields: Fields) -> Iterator[Document]:
    """Yields the documents of each file in turn, streamed.

    A `.txt` holds documents separated by blank lines; a `.jsonl` or `.json` holds one JSON object
    a line, whose keys `fields` are the document, as are those columns of every row of a `.parquet`.
    Files without documents are passed over with a warning. Raises UserError, with the file named,
    for whatever cannot be read, and where no file has a document.
    """
    empty = []
    for path in paths:
        found = False
        for document in _documents(path, fields):
            found = True
            yield document
        if not found:
            empty.append(path)
    if empty and len(empty) == len(paths):
        others = f" nor in {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(
            f"expected text in {empty[0]}, found no document there{others}; name files with text"
        )
    if empty:
        _warn_empty(str(empty[0]), len(empty), len(paths))


def declared_classes(paths: list[Path], fields: Fields) -> list[Sequence[str] | None]:
    """Returns the names of the classes as each file declares them, None where it does not."""
    found: list[Sequence[str] | None] = []
    for path in paths:
        with _explained(path):
            parquet = path.name.lower().endswith(_PARQUET) and path.stat().st_size
            found.append(parquet_classes(path, fields) if parquet else None)
    return found


@functools.cache  # Several passes over the same files say it once.
def _warn_empty(first: str, count: int, total: int) -> None:
    _log.warning(
        "%d of %d text files hold no document and are passed over, the first is %s",
        count,
        total,
        first,
    )


def _documents(path: Path, fields: Fields) -> Iterator[Document]:
    read = _reader(path)
    with _explained(path):
        if path.stat().st_size:  # Not every format of compression can be empty.
            yield from read(path, fields)


def _reader(path: Path) -> Callable[[Path, Fields], Iterator[Document]]:
    stem, suffix = os.path.splitext(path.name.lower())
    if suffix == _PARQUET:  # compressed within
        return parquet_documents
    compression = suffix if suffix in _OPENERS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix not in _READERS:
        raise UserError(
            f"expected a file that ends in {_PARQUET} or in one of {', '.join(_READERS)}, as it is "
            f"or with one of {', '.join(filter(None, _OPENERS))} behind, found {path}; convert or "
            f"rename it{nearest(suffix, (*_READERS, _PARQUET)) if suffix else ''}"
        )
    return functools.partial(_lines, _OPENERS[compression], _READERS[suffix])


def _lines(opener: Callable, reader: Callable, path: Path, fields: Fields) -> Iterator[Document]:
    # utf-8-sig also reads plain UTF-8; it drops the byte-order mark of some editors.
    with opener(path, "rt", encoding="utf-8-sig") as stream:
        yield from reader(stream, path, fields)


def _paragraphs(stream: TextIO, path: Path, fields: Fields) -> Iterator[Document]:
    if fields.label is not None:
        raise UserError(
            f"expected files of JSON lines or parquet for data.label_key={fields.label!r}, found "
            f"{path}, where no text has a class; convert it, or unset data.label_key"
        )
    lines: list[str] = []
    length = 0
    for line in _bounded_lines(stream):
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > MAX_DOCUMENT_CHARS):
            yield Document("".join(lines).strip())
            lines, length = [], 0
    if lines:
        yield Document("".join(lines).strip())


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


_READERS: dict[str, Callable[[TextIO, Path, Fields], Iterator[Document]]] = {
    ".txt": _paragraphs,
    ".jsonl": json_lines,
    ".json": json_lines,
    ".ndjson": json_lines,
}
