"""The kinds of subword vocabulary, built or trained with Hugging Face's tokenizers."""

import json
import os
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from quantizable_flax.data.text.alphabet import frequent_characters

# Set on purpose, the variable silences the library's warning about forks; no child tokenizes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

VERSION = tokenizers.__version__
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OPT_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # in the order of their ids in OPT
MASK = "<mask>"
ROBERTA_TOKENS = (*OPT_TOKENS, MASK)  # what a byte-level BPE for masked text has
GPT2_START = "<|endoftext|>"
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
MAX_ALPHABET = 1000
_PREFIX = "##"


def parse(text: str) -> Any:
    """Returns the tokenizer of a tokenizer.json; raises ValueError for anything else."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(str(error)) from None


def word_piece(vocab: dict[str, int], lowercase: bool, **options: bool) -> Any:
    """Returns BERT's tokenizer around `vocab`; other `options` are of its normalizer."""
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **options)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix=_PREFIX)
    known = [token for token in BERT_TOKENS if token in vocab]
    inner.add_special_tokens(known)
    if "[CLS]" in known and "[SEP]" in known:
        # For others who load the saved file; encode_batch does not use it.
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
        )
    return inner


def train_word_piece(texts: list[str], vocab_size: int, lowercase: bool) -> Any:
    """Trains with an alphabet whose ids are fixed beforehand.

    The library numbers the `##x` of the alphabet in the order of a randomly seeded hash table and
    breaks ties between merges by these numbers, so that two runs differ. Passed as special
    tokens, they are numbered first and in our order.
    """
    inner = word_piece({token: i for i, token in enumerate(BERT_TOKENS)}, lowercase)
    normalize, split = inner.normalizer.normalize_str, inner.pre_tokenizer.pre_tokenize_str
    alphabet, inside = frequent_characters(
        map(normalize, texts),
        lambda text: [word for word, _ in split(text)],
        limit=min(MAX_ALPHABET, vocab_size // 4),
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*BERT_TOKENS, *(_PREFIX + character for character in inside)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    # Around the bare vocabulary again: the `##x` are ordinary pieces.
    return word_piece(model_of(inner)["vocab"], lowercase)


def byte_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], *, add_prefix_space: bool = False
) -> Any:
    """Returns the tokenizer of GPT-2 and OPT, or RoBERTa's, around `vocab` and `merges`."""
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([token for token in (*OPT_TOKENS, GPT2_START) if token in vocab])
    if all(token in vocab for token in ROBERTA_TOKENS):
        # The space before a mask belongs to it.
        inner.add_special_tokens([tokenizers.AddedToken(MASK, lstrip=True, special=True)])
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")],
        )
    elif "</s>" in vocab:
        start_with(inner, "</s>")
    return inner


def start_with(inner: Any, start: str) -> None:
    """Makes `start` the token that begins documents, also for others who load the saved file."""
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start} $B:1",
        special_tokens=[(start, inner.token_to_id(start))],
    )


def start_of(inner: Any) -> str | None:
    """Returns the token that `start_with` was given, None where nothing or more is added."""
    processor = json.loads(inner.to_str())["post_processor"] or {}
    match processor.get("single"):
        case [{"SpecialToken": {"id": start}}, {"Sequence": _}]:
            return start
    return None


def train_byte_bpe(texts: list[str], vocab_size: int) -> Any:
    """Trains on bytes, all 256 of which are in the vocabulary, after OPT's special tokens."""
    inner = byte_bpe({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(OPT_TOKENS),
        initial_alphabet=list(BYTES),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    model = model_of(inner)
    return byte_bpe(model["vocab"], [tuple(merge) for merge in model["merges"]])


def add_token(inner: Any, content: str, **flags: bool) -> None:
    """Adds a token that text is searched for, unless it was added already."""
    if content not in {added.content for added in inner.get_added_tokens_decoder().values()}:
        inner.add_tokens([tokenizers.AddedToken(content, **flags)])


def has_mask(inner: Any) -> bool:
    """Whether a vocabulary is for masked text: RoBERTa's tokens, and more than a start around.

    OPT's has no <mask>; one that a file beside it adds leaves it what it is.
    """
    known = all(inner.token_to_id(token) is not None for token in ROBERTA_TOKENS)
    return known and start_of(inner) is None


def model_of(inner: Any) -> dict[str, Any]:
    """Returns the type, the vocabulary and the merges of a tokenizer, as in its JSON."""
    return json.loads(inner.to_str())["model"]


def is_byte_level(inner: Any) -> bool:
    """Whether the tokenizer is a byte-pair encoding of bytes."""
    return model_of(inner)["type"] == "BPE" and "ByteLevel" in repr(inner.decoder)


def is_unigram(inner: Any) -> bool:
    """Whether the tokenizer is a Unigram, as those of SentencePiece mostly are."""
    return isinstance(inner.model, models.Unigram)
