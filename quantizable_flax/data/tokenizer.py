"""Text to token ids: WordPiece trained here, or any tokenizer file with BERT's special tokens."""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from ml_collections import ConfigDict

from quantizable_flax.data.alphabet import frequent_characters
from quantizable_flax.data.cache import cache_dir, cache_key, write_atomically
from quantizable_flax.data.documents import describe_documents, iter_documents
from quantizable_flax.errors import UserError

# Set on purpose, the variable silences the library's warning about forks; no child tokenizes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A vocabulary of some thousand pieces is settled long before this much text.
MAX_TRAINING_CHARS = 64_000_000
MAX_ALPHABET = 1000
MIN_VOCAB_SIZE = 32
_PREFIX = "##"
_log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer with [PAD], [UNK], [CLS], [SEP] and [MASK]; raises UserError without them."""

    def __init__(self, inner: tokenizers.Tokenizer):
        vocab = inner.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise UserError(
                f"expected a tokenizer with {', '.join(SPECIAL_TOKENS)}, found no "
                f"{', '.join(missing)} among its {len(vocab)} tokens; use a BERT tokenizer"
            )
        inner.no_truncation()
        inner.no_padding()
        # A document that spells "[MASK]" must not smuggle in the special token.
        inner.encode_special_tokens = True
        self._inner = inner
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids = tuple(
            vocab[token] for token in SPECIAL_TOKENS
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens around them."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens included."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json; equal tokenizers give equal text."""
        return self._inner.to_str()

    @classmethod
    def from_json(cls, text: str, origin: str = "the tokenizer") -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json; `origin` names it in the error."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises plain Exception.
            raise UserError(
                f"expected a tokenizer.json in {origin}, found content that does not parse "
                f"({error}); save or fetch it again"
            ) from None
        return cls(inner)

    @classmethod
    def load(cls, path: str | os.PathLike, *, lowercase: bool = True) -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json, a vocab.txt or a folder with one of them.

        `lowercase` counts for a vocab.txt, which does not say it. Raises UserError for a file
        that is missing, cannot be read or is no tokenizer.
        """
        file = _tokenizer_file(Path(path).expanduser())
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"expected a readable UTF-8 file in {file}, found '{error}'; "
                "correct data.tokenizer.file"
            ) from None
        if file.suffix == ".json":
            return cls.from_json(text, str(file))
        pieces = text.removesuffix("\n").split("\n")
        vocab = {piece.rstrip("\r"): token for token, piece in enumerate(pieces)}
        if len(vocab) != len(pieces):
            raise UserError(
                f"expected one different token a line in {file}, found {len(pieces)} lines with "
                f"{len(vocab)} tokens; fetch the vocabulary again"
            )
        return cls(_word_piece(vocab, lowercase))

    @classmethod
    def train_wordpiece(
        cls, documents: Iterable[str], vocab_size: int, lowercase: bool = True
    ) -> "Tokenizer":
        """Returns a WordPiece of at most `vocab_size` tokens; the same text gives the same one.

        Reads the first MAX_TRAINING_CHARS characters and holds them in memory. Little text gives
        a smaller vocabulary. Raises UserError for a vocabulary too small for an alphabet.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"expected data.tokenizer.vocab_size of at least {MIN_VOCAB_SIZE}, "
                f"found {vocab_size}; 4096 suits a small corpus"
            )
        return cls(_train(list(_capped(documents)), vocab_size, lowercase))


def build_tokenizer(data_cfg: ConfigDict) -> Tokenizer:
    """Returns the tokenizer of data.tokenizer.file, or trains one on the train split.

    A trained tokenizer is kept in the cache folder.
    """
    options = data_cfg.tokenizer
    if options.file:
        return Tokenizer.load(options.file, lowercase=options.lowercase)
    description = {
        "documents": describe_documents(data_cfg, "train"),
        "vocab_size": options.vocab_size,
        "lowercase": options.lowercase,
        "version": [1, tokenizers.__version__],
    }
    path = cache_dir(data_cfg) / f"tokenizer-{cache_key(description)}.json"
    try:
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        pass  # Absent or damaged: train again.
    start = time.monotonic()
    documents = iter_documents(data_cfg, "train")
    tokenizer = Tokenizer.train_wordpiece(documents, options.vocab_size, options.lowercase)
    seconds = time.monotonic() - start
    _log.info("trained a WordPiece of %d tokens in %.1f s", tokenizer.vocab_size, seconds)
    try:
        write_atomically(path, lambda stream: stream.write(tokenizer.to_json().encode("utf-8")))
    except OSError as error:
        _log.warning("the tokenizer is not kept: %s cannot be written (%s)", path.parent, error)
    return tokenizer


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"expected a tokenizer.json or a vocab.txt in the folder {path}, found neither; "
            "correct data.tokenizer.file"
        )
    if path.suffix not in (".json", ".txt"):
        raise UserError(
            f"expected data.tokenizer.file to be a tokenizer.json or a vocab.txt, found {path}; "
            "name such a file or its folder"
        )
    return path


def _capped(documents: Iterable[str]) -> Iterator[str]:
    left = MAX_TRAINING_CHARS
    for text in documents:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _word_piece(vocab: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    """Returns BERT's tokenizer around `vocab`."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece(prefix=_PREFIX)
    known = [token for token in SPECIAL_TOKENS if token in vocab]
    inner.add_special_tokens(known)
    if "[CLS]" in known and "[SEP]" in known:
        # For others who load the saved file; encode_batch does not use it.
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
        )
    return inner


def _train(texts: list[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    """Trains with an alphabet whose ids are fixed beforehand.

    The library numbers the `##x` of the alphabet in the order of a randomly seeded hash table and
    breaks ties between merges by these numbers, so that two runs differ. Passed as special
    tokens, they are numbered first and in our order.
    """
    inner = _word_piece({token: i for i, token in enumerate(SPECIAL_TOKENS)}, lowercase)
    normalize, split = inner.normalizer.normalize_str, inner.pre_tokenizer.pre_tokenize_str
    alphabet, inside = frequent_characters(
        map(normalize, texts),
        lambda text: [word for word, _ in split(text)],
        limit=min(MAX_ALPHABET, vocab_size // 4),
    )
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(_PREFIX + character for character in inside)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    # Around the bare vocabulary again: the `##x` are ordinary pieces.
    vocab = json.loads(inner.to_str())["model"]["vocab"]
    return _word_piece(vocab, lowercase)
