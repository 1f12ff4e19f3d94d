"""Training, loading and saving of tokenizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantizable_flax.data.text.subword import BERT_TOKENS
from quantizable_flax.data.text.tokenizer import Tokenizer, without_endless_words
from quantizable_flax.data.text.tokenizer_build import build_tokenizer
from quantizable_flax.errors import UserError

from .conftest import random_documents

ROOT = Path(__file__).parents[2]
TEXT = ["The quick brown fox, won't jump!", "Zürich 日本語 — Straße", "[MASK] is spelled out"]


def vocabulary(tokenizer):
    return json.loads(tokenizer.to_json())["model"]["vocab"]


def write_vocab(path, tokenizer):
    pieces = sorted(vocabulary(tokenizer).items(), key=lambda item: item[1])
    path.write_text("".join(piece + "\n" for piece, _ in pieces), encoding="utf-8")
    return path


def test_special_ids_come_first_and_ids_are_dense(tokenizer):
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (0, 1, 4)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((2,), (3,))
    ids = vocabulary(tokenizer)
    assert sorted(ids.values()) == list(range(tokenizer.vocab_size))
    assert [ids[token] for token in BERT_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size <= 200


def test_text_survives_and_gets_no_special_tokens(tokenizer, documents):
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == text


def test_text_that_spells_a_special_token_does_not_become_one(tokenizer):
    (ids,) = tokenizer.encode_batch(["the [MASK] fox [SEP]"])
    assert not set(ids) & (set(tokenizer.special_ids) - {tokenizer.unk_id})


def test_a_rare_character_becomes_unknown():
    texts = ["common words only"] * 50 + ["日"]
    tokenizer = Tokenizer.train_wordpiece(texts, vocab_size=32)
    assert tokenizer.encode_batch(["日"]) == [[tokenizer.unk_id]]


def test_lowercase_is_an_option(documents):
    texts = [text.title() for text in documents]
    lower = Tokenizer.train_wordpiece(texts, 200, lowercase=True)
    cased = Tokenizer.train_wordpiece(texts, 200, lowercase=False)
    assert lower.decode(lower.encode_batch(["The Fox"])[0]) == "the fox"
    assert cased.decode(cased.encode_batch(["The Fox"])[0]) == "The Fox"


def test_training_is_the_same_in_every_process(tmp_path):
    # Bytes in many orders of magnitude and many ties, where the library alone differs by run.
    script = (
        "import sys; from quantizable_flax.data.text.tokenizer import Tokenizer\n"
        "from quantizable_flax.data.text.embedded import _topics\n"
        "texts = _topics() or [f'{n} is not {n * 7919}' for n in range(4000)]\n"
        "sys.stdout.write(Tokenizer.train_wordpiece(texts, 1000).to_json())"
    )
    outputs = set()
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "2")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", script]
        outputs.add(
            subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True).stdout
        )
    assert len(outputs) == 1
    assert Tokenizer.from_json(outputs.pop().decode()).vocab_size == 1000


def test_round_trip_through_json(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.encode_batch(TEXT) == tokenizer.encode_batch(TEXT)


@pytest.mark.parametrize("as_folder", [False, True])
def test_round_trip_through_vocab_txt(tmp_path, tokenizer, as_folder):
    path = write_vocab(tmp_path / "vocab.txt", tokenizer)
    again = Tokenizer.load(tmp_path if as_folder else path)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode_batch(TEXT) == tokenizer.encode_batch(TEXT)
    cased = Tokenizer.load(path, lowercase=False)
    assert cased.encode_batch(["THE"]) == [[tokenizer.unk_id]]


def test_a_folder_prefers_tokenizer_json(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    (tmp_path / "vocab.txt").write_text("unused\n")
    assert Tokenizer.load(tmp_path).to_json() == tokenizer.to_json()


def test_truncation_in_a_file_is_ignored(tokenizer):
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    again = Tokenizer.from_json(json.dumps(content))
    assert again.encode_batch(["the fox " * 5]) == tokenizer.encode_batch(["the fox " * 5])


def test_build_trains_on_the_train_split_once(text_config):
    config = text_config()
    first = build_tokenizer(config.data)
    (path,) = Path(config.data.cache_dir).glob("tokenizer-*.json")
    other = Tokenizer.train_wordpiece(["a text of its own"], 40)
    path.write_text(other.to_json())
    assert build_tokenizer(config.data).to_json() == other.to_json() != first.to_json()


def test_build_replaces_a_damaged_cache(text_config):
    config = text_config()
    first = build_tokenizer(config.data)
    (path,) = Path(config.data.cache_dir).glob("tokenizer-*.json")
    path.write_text("{")
    assert build_tokenizer(config.data).to_json() == first.to_json()
    assert path.read_text() == first.to_json()


def test_build_without_a_writable_cache_warns(text_config, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    config = text_config(cache_dir=str(tmp_path / "file" / "below"))
    assert build_tokenizer(config.data).vocab_size > 50
    assert str(tmp_path / "file" / "below") in caplog.text


def test_build_loads_the_configured_file(text_config, tmp_path, tokenizer):
    path = write_vocab(tmp_path / "vocab.txt", tokenizer)
    config = text_config()
    config.data.tokenizer.file = str(path)
    assert build_tokenizer(config.data).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("absent.json", None, "expected a readable UTF-8 file in .*absent.json"),
        ("tokenizer.json", b"{", "does not parse"),
        ("tokenizer.json", b"{}", "does not parse"),
        ("tokenizer.json", b"\xff\xfe", "readable UTF-8"),
        ("vocab.txt", b"", r"found no \[PAD\]"),
        (
            "vocab.txt",
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nfox\n",
            r"found no \[MASK\] among its 5 tokens",
        ),
        ("vocab.txt", b"[PAD]\nfox\nfox\n", "found 3 lines with 2 tokens"),
        ("merges.bpe", b"", "tokenizer.json, a vocab.txt or a vocab.json"),
    ],
)
def test_bad_files(tmp_path, name, content, pattern):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        Tokenizer.load(tmp_path / name)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="found none of them"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_too_small(documents):
    with pytest.raises(UserError, match="at least 32, found 10"):
        Tokenizer.train_wordpiece(documents, vocab_size=10)


def test_endless_words_take_no_part_in_training():
    """Their pieces take the square of their length to find: a megabyte would take hours."""
    endless, ideographs = "abcdefghij" * 100, "\u4e2d\u6587" * 600
    ordinary = f"{'x' * 999} https://example.com/{'a/' * 500} {'= ' * 600}{ideographs}"
    assert without_endless_words(ordinary) == ordinary
    assert without_endless_words(f"one {endless}, two{endless}.") == "one  ,  ."
    texts = random_documents(200)
    trained = Tokenizer.train_wordpiece([*texts, endless * 1000], 160)
    assert trained.to_json() == Tokenizer.train_wordpiece(texts, 160).to_json()
