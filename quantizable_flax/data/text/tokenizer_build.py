"""The tokenizer that a configuration asks for: read from its file or trained and kept."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from quantizable_flax.data.cache import cache_dir, cache_key, one_at_a_time, write_atomically
from quantizable_flax.data.text import subword
from quantizable_flax.data.text.corpora import corpora
from quantizable_flax.data.text.documents import describe_documents, iter_documents
from quantizable_flax.data.text.tokenizer import (
    BYTE_BPE,
    MASKED_BYTE_BPE,
    MASKED_UNIGRAM,
    MAX_TRAINING_CHARS,
    WORDPIECE,
    Tokenizer,
    capped,
)
from quantizable_flax.errors import UserError

_NAMES = {
    WORDPIECE: "a WordPiece",
    BYTE_BPE: "a byte-level BPE without <mask>",
    MASKED_BYTE_BPE: "a byte-level BPE with <mask>",
    MASKED_UNIGRAM: "a Unigram with <mask>",
}
# What serves as well as a tokenizer of the kind that is trained.
_ACCEPTED = {WORDPIECE: (WORDPIECE, MASKED_BYTE_BPE, MASKED_UNIGRAM), BYTE_BPE: (BYTE_BPE,)}
_log = logging.getLogger(__name__)


def build_tokenizer(data_cfg: ConfigDict, kind: str = WORDPIECE) -> Tokenizer:
    """Returns the tokenizer of data.tokenizer.file, or trains one on the train split.

    A trained tokenizer is kept in the cache folder.

    Args:
      data_cfg: config.data.
      kind: of one that is trained, "wordpiece" or "byte_bpe"; a file may be of one that serves as
        well, see `check_kind`.

    Raises:
      UserError: a file that is no such tokenizer, or text that cannot be read.
    """
    options = data_cfg.tokenizer
    if options.file:
        loaded = load_file(data_cfg)
        check_kind(loaded, kind, str(options.file))
        asked = options.get("lowercase")
        if asked is not None and loaded.lowercase not in (asked, None):
            raise UserError(
                f"expected data.tokenizer.lowercase to be unset or {loaded.lowercase} as in "
                f"{options.file}, found {asked}; leave it out, or change the file"
            )
        return loaded
    path = cache_dir(data_cfg) / f"tokenizer-{_key(data_cfg, kind)}.json"
    kept = _kept(path)
    if kept is None:
        with one_at_a_time(path):
            kept = _kept(path) or _trained(path, data_cfg, kind)  # or another process did
    return kept


def _kept(path: Path) -> Tokenizer | None:
    """Returns the tokenizer of a cache file, None where it is absent or damaged."""
    try:
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return None


def _trained(path: Path, data_cfg: ConfigDict, kind: str) -> Tokenizer:
    start = time.monotonic()
    trained = _train(data_cfg, kind)
    seconds = time.monotonic() - start
    _log.info("trained %s of %d tokens in %.1f s", _NAMES[kind], trained.vocab_size, seconds)
    try:
        write_atomically(path, lambda stream: stream.write(trained.to_json().encode("utf-8")))
    except OSError as error:
        _log.warning("the tokenizer is not kept: %s cannot be written (%s)", path.parent, error)
    return trained


def load_file(data_cfg: ConfigDict) -> Tokenizer:
    """Returns the tokenizer of data.tokenizer.file."""
    options = data_cfg.tokenizer
    return Tokenizer.load(options.file, lowercase=options.get("lowercase"))


def is_file_of(saved: Tokenizer, data_cfg: ConfigDict) -> bool:
    """Whether data.tokenizer.file is what the tokenizer of a checkpoint was made from.

    A run that began before the files beside a vocabulary were read goes on as it began.
    """
    if load_file(data_cfg).same_ids(saved):
        return True
    options = data_cfg.tokenizer
    if options.get("lowercase") is False and saved.lowercase:
        return False
    plain = Tokenizer.load(options.file, lowercase=saved.lowercase, beside=False)
    if not plain.same_ids(saved):
        return False
    _log.warning(
        "the tokenizer of the checkpoint is used on, which does not follow the files beside %s",
        options.file,
    )
    return True


def check_kind(found: Tokenizer, kind: str, origin: str) -> None:
    """Raises UserError for a tokenizer that a model of `kind` does not take.

    Masked text, whose own kind is "wordpiece", takes RoBERTa's as well.
    """
    accepted = _ACCEPTED[kind]
    if found.kind not in accepted:
        raise UserError(
            f"expected {' or '.join(_NAMES[one] for one in accepted)} as the tokenizer of this "
            f"model, found {_NAMES[found.kind]} in {origin}; use the tokenizer of a model of the "
            "same family"
        )


def _key(data_cfg: ConfigDict, kind: str) -> str:
    options = data_cfg.tokenizer
    description = {
        "documents": describe_documents(data_cfg, "train"),
        "vocab_size": options.vocab_size,
        "version": [2, subword.VERSION],
        "kind": kind,
    }
    if kind == WORDPIECE:
        description["lowercase"] = _lowercase(options)
    return cache_key(description)


def _train(data_cfg: ConfigDict, kind: str) -> Tokenizer:
    options, documents = data_cfg.tokenizer, training_documents(data_cfg)
    if kind == BYTE_BPE:
        return Tokenizer.train_byte_bpe(documents, options.vocab_size)
    return Tokenizer.train_wordpiece(documents, options.vocab_size, _lowercase(options))


def _lowercase(options: ConfigDict) -> bool:
    return options.lowercase is not False


def training_documents(data_cfg: ConfigDict, max_chars: int = MAX_TRAINING_CHARS) -> Iterator[str]:
    """Yields an equal share of every corpus, so that the first does not crowd out the others."""
    parts = corpora(data_cfg)
    for part in parts:
        yield from capped(iter_documents(part.config, "train"), max_chars // len(parts))
