"""Text to token ids: WordPiece for BERT, byte-level BPE for OPT and RoBERTa, Unigram for XLM-R."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantizable_flax.data.text import subword
from quantizable_flax.data.text.pieces import pieces
from quantizable_flax.data.text.subword import (
    BERT_TOKENS,
    BYTES,
    GPT2_START,
    MASK,
    OPT_TOKENS,
    ROBERTA_TOKENS,
)
from quantizable_flax.data.text.tokenizer_files import parse_json, read_tokenizer
from quantizable_flax.errors import UserError

WORDPIECE, BYTE_BPE = "wordpiece", "byte_bpe"
MASKED_BYTE_BPE, MASKED_UNIGRAM = "masked_byte_bpe", "masked_unigram"
_LIKE_ROBERTA = (MASKED_BYTE_BPE, MASKED_UNIGRAM)
# A vocabulary of some thousand pieces is settled long before this much text.
MAX_TRAINING_CHARS = 64_000_000
MAX_WORD = 1000  # WordPiece itself takes words of more than 100 characters for unknown
# Ideographs are words of their own, though nothing stands between them.
_ENDLESS = re.compile(
    rf"[^\W\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]{{{MAX_WORD},}}"
)
_LONG = re.compile(rf"\S{{{MAX_WORD}}}")  # quick to rule out
_NAMES = {  # of the tokens that pad, stand for what is unknown, and mask
    WORDPIECE: ("[PAD]", "[UNK]", "[MASK]"),
    BYTE_BPE: ("<pad>", "<unk>", ""),
    **dict.fromkeys(_LIKE_ROBERTA, ("<pad>", "<unk>", MASK)),
}
MIN_WORDPIECE_SIZE = 32
MIN_BPE_SIZE = len(OPT_TOKENS) + len(BYTES)


class Tokenizer:
    """Text to ids and back; raises UserError for a tokenizer of none of these kinds.

    Attributes:
      kind: "wordpiece" (anything with BERT's special tokens), "byte_bpe" (of OPT or GPT-2),
        "masked_byte_bpe" (of RoBERTa) or "masked_unigram" (of XLM-R).
      vocab_size: one more than the highest id.
      prefix_ids, suffix_ids: what stands before and after every document.
      pad_id, mask_id: None where there is no such token.
      special_ids: of all special tokens.
    """

    def __init__(self, inner: Any):
        vocab = inner.get_vocab(with_added_tokens=True)
        self.kind = _kind(inner, vocab)
        _check_tokens(vocab, self.kind)
        inner.no_truncation()
        inner.no_padding()
        # A document that spells "[MASK]" must not smuggle in the special token.
        inner.encode_special_tokens = True
        self._inner = inner
        self.vocab_size = max(vocab.values()) + 1
        if self.kind == WORDPIECE:
            self.special_ids = tuple(vocab[token] for token in BERT_TOKENS)
            self.prefix_ids: tuple[int, ...] = (vocab["[CLS]"],)
            self.suffix_ids: tuple[int, ...] = (vocab["[SEP]"],)
        else:
            added = inner.get_added_tokens_decoder().items()
            special = {token for token, piece in added if piece.special}
            if self.kind in _LIKE_ROBERTA:
                special |= {vocab[token] for token in ROBERTA_TOKENS}
                self.prefix_ids, self.suffix_ids = (vocab["<s>"],), (vocab["</s>"],)
            else:
                start = subword.start_of(inner) or ("</s>" if "</s>" in vocab else GPT2_START)
                self.prefix_ids, self.suffix_ids = (vocab[start],), ()
            self.special_ids = tuple(sorted(special))
        pad, unk, mask = _NAMES[self.kind]
        self.pad_id, self.unk_id, self.mask_id = vocab.get(pad), vocab.get(unk), vocab.get(mask)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens around them."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        if self.kind != MASKED_UNIGRAM:
            return [encoding.ids for encoding in encodings]
        # Its model finds the pieces <s> and <mask> in text that spells them: they are unknown.
        special = set(self.special_ids)
        return [[self.unk_id if i in special else i for i in e.ids] for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens included."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json; equal tokenizers give equal text."""
        return self._inner.to_str()

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids, whatever files they come from."""
        return self._ids() == other._ids()

    def _ids(self) -> list[Any]:
        content = json.loads(self.to_json())
        model = content["model"]
        vocab = self._inner.get_vocab(with_added_tokens=True)
        spaced = (content["pre_tokenizer"] or {}).get("add_prefix_space", False)
        return [
            self.kind,
            vocab,
            model.get("merges"),
            model["vocab"] if self.kind == MASKED_UNIGRAM else None,  # with its scores
            content["normalizer"],
            self.prefix_ids,
            spaced,
        ]

    @property
    def lowercase(self) -> bool | None:
        """Whether text is lower-cased; None where the tokenizer says it in another way."""
        return (json.loads(self.to_json())["normalizer"] or {}).get("lowercase")

    @classmethod
    def from_json(cls, text: str, origin: str = "the tokenizer") -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json; `origin` names it in the error."""
        return cls(parse_json(text, origin))

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, lowercase: bool | None = None, beside: bool = True
    ) -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json, vocab.txt, vocab.json or their folder.

        A merges.txt lies beside a vocab.json.

        Args:
          path: the file or folder.
          lowercase: whether the text of a vocab.txt is lower-cased, whatever files beside it say;
            None to do as they say, and to lower-case where they do not.
          beside: whether such files are read: tokenizer_config.json, special_tokens_map.json,
            added_tokens.json and config.json.

        Raises:
          UserError: a file that is missing, cannot be read or is no tokenizer.
        """
        return cls(read_tokenizer(Path(path).expanduser(), lowercase, beside=beside))

    @classmethod
    def train_wordpiece(
        cls, documents: Iterable[str], vocab_size: int, lowercase: bool = True
    ) -> "Tokenizer":
        """Returns a WordPiece of at most `vocab_size` tokens; the same text gives the same one.

        Reads the first MAX_TRAINING_CHARS characters and holds them in memory. Little text gives
        a smaller vocabulary. Raises UserError for a vocabulary too small for an alphabet.
        """
        _check_size(vocab_size, MIN_WORDPIECE_SIZE)
        return cls(subword.train_word_piece(_for_training(documents), vocab_size, lowercase))

    @classmethod
    def train_byte_bpe(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Returns a byte-level BPE with OPT's special tokens; otherwise as `train_wordpiece`."""
        _check_size(vocab_size, MIN_BPE_SIZE)
        return cls(subword.train_byte_bpe(_for_training(documents), vocab_size))


def _kind(inner: Any, vocab: dict[str, int]) -> str:
    """The kind of the library's tokenizer; a WordPiece is what has nothing of the others."""
    if all(token in vocab for token in BERT_TOKENS):
        return WORDPIECE
    if subword.is_unigram(inner):
        return MASKED_UNIGRAM if subword.has_mask(inner) else WORDPIECE
    if subword.is_byte_level(inner):
        return MASKED_BYTE_BPE if subword.has_mask(inner) else BYTE_BPE
    return WORDPIECE


def _for_training(documents: Iterable[str]) -> list[str]:
    return [without_endless_words(text) for text in capped(documents)]


def without_endless_words(text: str) -> str:
    """Returns a text without its runs of MAX_WORD word characters and more.

    No vocabulary needs them, and to find its pieces in them takes the square of their length.
    """
    return _ENDLESS.sub(" ", text) if _LONG.search(text) else text


def capped(documents: Iterable[str], max_chars: int = MAX_TRAINING_CHARS) -> Iterator[str]:
    """Yields the first `max_chars` characters of documents.

    Long ones come in pieces, for training counts words.
    """
    left = max_chars
    for text in documents:
        yield from pieces(text[:left])
        left -= len(text)
        if left <= 0:
            return


def _check_size(vocab_size: int, smallest: int) -> None:
    if vocab_size < smallest:
        raise UserError(
            f"expected data.tokenizer.vocab_size of at least {smallest}, "
            f"found {vocab_size}; 4096 suits a small corpus"
        )


def _check_tokens(vocab: dict[str, int], kind: str) -> None:
    if kind == WORDPIECE:
        missing = [token for token in BERT_TOKENS if token not in vocab]
        if missing:
            raise UserError(
                f"expected a tokenizer with {', '.join(BERT_TOKENS)}, found no "
                f"{', '.join(missing)} among its {len(vocab)} tokens; use a BERT tokenizer"
            )
        return
    if kind == MASKED_UNIGRAM:
        return  # its tokens made it one
    unknown = [symbol for symbol in BYTES if symbol not in vocab]
    if unknown:
        raise UserError(
            f"expected a byte-level BPE with all 256 bytes, found {len(unknown)} missing among its "
            f"{len(vocab)} tokens; use the tokenizer of OPT or GPT-2, or train one"
        )
    if "</s>" not in vocab and GPT2_START not in vocab:
        raise UserError(
            f"expected </s> or {GPT2_START} in a byte-level BPE, to start documents, found neither "
            f"among its {len(vocab)} tokens; use the tokenizer of OPT or GPT-2, or train one"
        )
