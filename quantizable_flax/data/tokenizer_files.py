"""Tokenizers of others: tokenizer.json, vocab.txt, or vocab.json with merges.txt."""

import json
from pathlib import Path
from typing import Any

from quantizable_flax.data import subword
from quantizable_flax.errors import UserError

_VOCAB, _MERGES = "vocab.json", "merges.txt"
_KNOWN = f"a tokenizer.json, a vocab.txt or a {_VOCAB} with its {_MERGES}"


def read_tokenizer(path: Path, lowercase: bool) -> Any:
    """Returns the library's tokenizer of a file or of a folder with one.

    `lowercase` counts for a vocab.txt, which does not say it. Raises UserError for a file that is
    missing, cannot be read or is no tokenizer.
    """
    file = _file_of(path)
    if file.name.endswith(_MERGES):
        file = file.with_name(file.name.removesuffix(_MERGES) + _VOCAB)
    text = _text_of(file)
    if file.name.endswith(_VOCAB):
        merges = file.with_name(file.name.removesuffix(_VOCAB) + _MERGES)
        vocab = _json_vocab(text, file)
        return subword.byte_bpe(vocab, _merges(_text_of(merges), merges, vocab))
    if file.suffix == ".json":
        return parse_json(text, str(file))
    return subword.word_piece(_lines_vocab(text, file), lowercase)


def parse_json(text: str, origin: str) -> Any:
    """Returns the library's tokenizer of a tokenizer.json; `origin` names it in the error."""
    try:
        return subword.parse(text)
    except ValueError as error:
        raise UserError(
            f"expected a tokenizer.json in {origin}, found content that does not parse "
            f"({error}); save or fetch it again"
        ) from None


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt", _VOCAB):
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"expected {_KNOWN} in the folder {path}, found none of them; "
            "correct data.tokenizer.file"
        )
    if path.suffix not in (".json", ".txt"):
        raise UserError(
            f"expected data.tokenizer.file to be {_KNOWN}, found {path}; "
            "name such a file or its folder"
        )
    return path


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a readable UTF-8 file in {file}, found '{error}'; "
            "correct data.tokenizer.file"
        ) from None


def _lines_vocab(text: str, file: Path) -> dict[str, int]:
    pieces = text.removesuffix("\n").split("\n")
    vocab = {piece.rstrip("\r"): token for token, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise UserError(
            f"expected one different token a line in {file}, found {len(pieces)} lines with "
            f"{len(vocab)} tokens; fetch the vocabulary again"
        )
    return vocab


def _json_vocab(text: str, file: Path) -> dict[str, int]:
    try:
        vocab = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        vocab = None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids) or not ids:
        raise UserError(
            f"expected a JSON object from tokens to ids in {file}, found something else; "
            "fetch the vocabulary again"
        )
    if len(set(ids)) != len(ids):
        raise UserError(
            f"expected a different id for each token in {file}, found {len(ids)} tokens with "
            f"{len(set(ids))} ids; fetch the vocabulary again"
        )
    return vocab


def _merges(text: str, file: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(
                f"expected two tokens of {_VOCAB}, whose join is one too, in {file}, "
                f"line {number}, found {line!r}; fetch both files from the same place"
            )
        merges.append((left, right))
    return merges
