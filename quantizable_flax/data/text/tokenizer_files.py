"""Tokenizers of others: tokenizer.json, vocab.txt, or vocab.json with merges.txt."""

import json
import logging
from pathlib import Path
from typing import Any

from quantizable_flax.data.text import subword
from quantizable_flax.data.text.tokenizer_settings import (
    VOCAB_JSON,
    VOCAB_LINES,
    WHOLE,
    Settings,
    add_tokens,
    read_settings,
)
from quantizable_flax.errors import UserError

_MERGES = "merges.txt"
_KNOWN = f"a {WHOLE}, a {VOCAB_LINES} or a {VOCAB_JSON} with its {_MERGES}"
_log = logging.getLogger(__name__)


def read_tokenizer(path: Path, lowercase: bool | None, *, beside: bool) -> Any:
    """Returns the library's tokenizer of a file or of a folder with one.

    With `beside`, files beside it that say how it is used are read. `lowercase` counts for a
    vocab.txt, before they do. Raises UserError for a file that is missing, cannot be read or is no
    tokenizer.
    """
    file = _file_of(path)
    if file.name.endswith(_MERGES):
        file = file.with_name(file.name.removesuffix(_MERGES) + VOCAB_JSON)
    text = _text_of(file)
    if file.name.endswith(VOCAB_JSON):
        return _byte_bpe(text, file, read_settings(file, VOCAB_JSON) if beside else Settings())
    if file.suffix == ".json":
        inner = parse_json(text, str(file))
        return _adjusted(inner, read_settings(file, WHOLE)) if beside else inner
    settings = read_settings(file, VOCAB_LINES) if beside else Settings()
    return _word_piece(_lines_vocab(text, file), file, lowercase, settings)


def _word_piece(
    vocab: dict[str, int], file: Path, lowercase: bool | None, settings: Settings
) -> Any:
    said = settings.lowercase
    if lowercase is None:
        lowercase = True if said is None else said
        capital = next((p for p in vocab if p != p.lower() and not p.startswith("[")), None)
        if said is None and capital is not None:
            _log.warning(
                "nothing says whether %s takes lower-cased text, as is usual, and it has tokens "
                "with capitals such as %r, which that never has; "
                "--config.data.tokenizer.lowercase=False keeps capitals",
                file,
                capital,
            )
    elif said is not None and said != lowercase:
        _log.warning(
            "data.tokenizer.lowercase=%s is followed for %s, although %s says otherwise",
            lowercase,
            file,
            settings.case_from,
        )
    inner = subword.word_piece(vocab, **{**settings.normalizer, "lowercase": lowercase})
    add_tokens(inner, settings, file)
    return inner


def _byte_bpe(text: str, file: Path, settings: Settings) -> Any:
    merges = file.with_name(file.name.removesuffix(VOCAB_JSON) + _MERGES)
    vocab = _json_vocab(text, file)
    pairs = _merges(_text_of(merges), merges, vocab)
    inner = subword.byte_bpe(vocab, pairs, add_prefix_space=bool(settings.add_prefix_space))
    add_tokens(inner, settings, file)
    # What masks has both ends of a document marked, of which bos_token is just one.
    if settings.start is not None and not subword.has_mask(inner):
        if inner.token_to_id(settings.start) is None:
            raise UserError(
                f"expected the bos_token {settings.start!r} of the files beside {file} among its "
                "tokens, found it nowhere; fetch all files from the same place"
            )
        subword.start_with(inner, settings.start)
    return inner


def _adjusted(inner: Any, settings: Settings) -> Any:
    """Returns a whole tokenizer with what the files beside it say more recently."""
    content = json.loads(inner.to_str())
    normalizer, split = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    if normalizer.get("type") == "BertNormalizer":
        normalizer.update(settings.normalizer)
    if split.get("type") == "ByteLevel" and settings.add_prefix_space is not None:
        split["add_prefix_space"] = settings.add_prefix_space
    return subword.parse(json.dumps(content))


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
        for name in (WHOLE, VOCAB_LINES, VOCAB_JSON):
            if (path / name).is_file():
                return path / name
        prefixed = [file for name in (VOCAB_LINES, VOCAB_JSON) for file in path.glob(f"*-{name}")]
        if len(prefixed) == 1:
            return prefixed[0]
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
        return file.read_text(encoding="utf-8-sig")  # Some editors put a mark before the text.
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
                f"expected two tokens of {VOCAB_JSON}, whose join is one too, in {file}, "
                f"line {number}, found {line!r}; fetch both files from the same place"
            )
        merges.append((left, right))
    return merges
