"""Documents of local text: `.txt` and `.jsonl`, plain or compressed with gzip or xz."""

import contextlib
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from quantizable_flax.data.paths import matched
from quantizable_flax.errors import UserError, nearest

# A text without blank lines must not end up in memory whole.
MAX_DOCUMENT_CHARS = 1 << 20
_OPENERS: dict[str, Callable] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_CORRUPT = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


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

    A `.txt` holds documents separated by blank lines; a `.jsonl` holds one JSON object a line,
    whose `text_key` is the document. Raises UserError, with the file named, for whatever cannot
    be read and for a file without documents.
    """
    for path in paths:
        opener, reader = _reader(path)
        count = 0
        # utf-8-sig also reads plain UTF-8; it drops the byte-order mark of some editors.
        with _explained(path), opener(path, "rt", encoding="utf-8-sig") as stream:
            for text in reader(stream, path, text_key):
                count += 1
                yield text
        if not count:
            raise UserError(
                f"expected text in {path}, found no document; remove it from the list of files"
            )


def _reader(path: Path) -> tuple[Callable, Callable[[TextIO, Path, str], Iterator[str]]]:
    stem, suffix = path.name, path.suffix
    compression = suffix if suffix in _OPENERS else ""
    if compression:
        stem = path.name[: -len(compression)]
        suffix = Path(stem).suffix
    if suffix not in _READERS:
        names = [text + packed for text in _READERS for packed in _OPENERS]
        raise UserError(
            f"expected a file that ends in one of {', '.join(names)}, found {path}; "
            f"convert or rename it{nearest(suffix, _READERS) if suffix else ''}"
        )
    return _OPENERS[compression], _READERS[suffix]


def _paragraphs(stream: TextIO, path: Path, text_key: str) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in stream:
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > MAX_DOCUMENT_CHARS):
            yield "".join(lines).strip()
            lines, length = [], 0
    if lines:
        yield "".join(lines).strip()


def _json_lines(stream: TextIO, path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        text = _text_of(line, f"{path}, line {number}", text_key).strip()
        if text:
            # JSON escapes can spell lone surrogates, which no tokenizer takes.
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _text_of(line: str, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "too deeply nested")
        raise UserError(
            f"expected one JSON object a line in {where}, found invalid JSON ({reason}); "
            "correct the line"
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
        raise UserError(
            f"expected a whole {path.suffix} file in {path}, found it truncated or corrupt "
            f"({error}); fetch or compress it again"
        ) from None
    except OSError as error:
        raise UserError(
            f"expected a readable file in {path}, found '{error.strerror or error}'; "
            "correct the path or its permissions"
        ) from None


_READERS: dict[str, Callable[[TextIO, Path, str], Iterator[str]]] = {
    ".txt": _paragraphs,
    ".jsonl": _json_lines,
}
