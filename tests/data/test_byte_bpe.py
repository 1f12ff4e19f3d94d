"""Byte-level BPE: known ids, exact round trips, repeatable training, files as others ship them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from quantizable_flax.data.text.subword import BYTES
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

ROOT = Path(__file__).parents[2]
# "Ġ" is how GPT-2 writes the byte of a space, "Ċ" that of a line break.
MERGES = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("Ġlow", "er")]


def gpt2_vocab(specials, merges=MERGES, at_end=False):
    """Returns a vocabulary numbered as OPT's (specials first) or as GPT-2's (specials last)."""
    pieces = [*BYTES, *("".join(merge) for merge in merges)]
    ordered = [*pieces, *specials] if at_end else [*specials, *pieces]
    return {piece: token for token, piece in enumerate(ordered)}


def write_files(folder, vocab, merges=MERGES, prefix=""):
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / f"{prefix}vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / f"{prefix}merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return folder


def ids_of(vocab, pieces):
    return [vocab[piece] for piece in pieces.split(" ")]


@pytest.fixture
def opt_folder(tmp_path):
    return write_files(tmp_path, gpt2_vocab(["<s>", "<pad>", "</s>", "<unk>"]))


def test_known_ids(opt_folder):
    tokenizer, vocab = Tokenizer.load(opt_folder), gpt2_vocab(["<s>", "<pad>", "</s>", "<unk>"])
    texts = ["low lower", "  lower", "lo\nwer", "é9"]
    # A run of spaces leaves its last one to the word; letters and digits are words of their own.
    expected = ["low Ġlower", "Ġ Ġlower", "lo Ċ w er", "Ã © 9"]
    assert tokenizer.encode_batch(texts) == [ids_of(vocab, pieces) for pieces in expected]


def test_special_tokens_of_opt(opt_folder):
    tokenizer = Tokenizer.load(opt_folder)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("byte_bpe", 4 + 256 + len(MERGES))
    assert tokenizer.special_ids == (0, 1, 2, 3)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (1, 3, None)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((2,), ())


def test_the_only_special_token_of_gpt2_starts_documents(tmp_path):
    vocab = gpt2_vocab(["<|endoftext|>"], at_end=True)
    tokenizer = Tokenizer.load(write_files(tmp_path, vocab))
    last = 256 + len(MERGES)
    assert (tokenizer.special_ids, tokenizer.prefix_ids) == ((last,), (last,))
    assert (tokenizer.pad_id, tokenizer.suffix_ids) == (None, ())
    assert tokenizer.encode_batch([" low"]) == [[vocab["Ġlow"]]]


@pytest.mark.parametrize("name", ["", "vocab.json", "merges.txt", "tokenizer.json"])
def test_every_form_gives_the_same_ids(opt_folder, name, tmp_path):
    first = Tokenizer.load(opt_folder)
    if name == "tokenizer.json":
        (opt_folder / name).write_text(first.to_json(), encoding="utf-8")
    again = Tokenizer.load(opt_folder / name)
    assert again.same_ids(first)
    assert again.to_json() == first.to_json()


def test_files_with_a_common_prefix(tmp_path):
    write_files(tmp_path, gpt2_vocab(["</s>"]), prefix="gpt2-")
    assert Tokenizer.load(tmp_path / "gpt2-vocab.json").prefix_ids == (0,)


def test_others_who_load_the_file_get_the_start_too(byte_tokenizer):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(byte_tokenizer.to_json())
    (ids,) = byte_tokenizer.encode_batch(["the fox"])
    assert inner.encode("the fox").ids == [2, *ids]


@hypothesis.given(strategies.text())
def test_any_text_survives(byte_tokenizer, text):
    (ids,) = byte_tokenizer.encode_batch([text])
    assert byte_tokenizer.decode(ids) == text
    assert not set(ids) & set(byte_tokenizer.special_ids)


@pytest.mark.parametrize("text", ["a </s> b", "</s>", "<s><pad><unk>", "<|endoftext|>"])
def test_text_that_spells_a_special_token_does_not_become_one(byte_tokenizer, tmp_path, text):
    gpt2 = Tokenizer.load(write_files(tmp_path, gpt2_vocab(["<|endoftext|>"])))
    for tokenizer in (byte_tokenizer, gpt2):
        (ids,) = tokenizer.encode_batch([text])
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == text


def test_training_numbers_specials_then_bytes_then_merges(byte_tokenizer, documents):
    vocab = json.loads(byte_tokenizer.to_json())["model"]["vocab"]
    ordered = sorted(vocab, key=vocab.get)
    assert ordered[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert sorted(ordered[4:260]) == list(BYTES)
    assert byte_tokenizer.vocab_size == len(vocab) == 300
    assert max(len(piece) for piece in ordered[260:]) >= len(" quantized")


def test_training_is_the_same_in_every_process():
    script = (
        "import sys; from quantizable_flax.data.text.tokenizer import Tokenizer\n"
        "texts = [f'{n} is not {n * 7919} — ü' for n in range(3000)]\n"
        "sys.stdout.write(Tokenizer.train_byte_bpe(texts, 600).to_json())"
    )
    outputs = set()
    for seed, threads in (("1", "1"), ("2", "2")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", script]
        outputs.add(
            subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True).stdout
        )
    assert len(outputs) == 1
    assert Tokenizer.from_json(outputs.pop().decode()).vocab_size == 600


def test_a_vocabulary_too_small(documents):
    with pytest.raises(UserError, match="at least 260, found 259"):
        Tokenizer.train_byte_bpe(documents, 259)
    assert Tokenizer.train_byte_bpe(documents, 260).vocab_size == 260


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("vocab.json", "{", "a JSON object from tokens to ids in .*vocab.json"),
        ("vocab.json", "[1]", "a JSON object from tokens to ids"),
        ("vocab.json", "{}", "a JSON object from tokens to ids"),
        ("vocab.json", '{"a": "b"}', "a JSON object from tokens to ids"),
        ("vocab.json", '{"a": -1}', "a JSON object from tokens to ids"),
        ("vocab.json", '{"a": 1, "b": 1}', "found 2 tokens with 1 ids"),
        ("merges.txt", None, "a readable UTF-8 file in .*merges.txt"),
        ("merges.txt", "#version: 0.2\nl o\nq z\n", "line 3, found 'q z'"),
        ("merges.txt", "lo\n", "line 1, found 'lo'"),
        ("merges.txt", "l o w\n", "line 1, found 'l o w'"),
    ],
)
def test_bad_files(opt_folder, file, content, pattern):
    (opt_folder / file).unlink()
    if content is not None:
        (opt_folder / file).write_text(content)
    with pytest.raises(UserError, match=pattern) as caught:
        Tokenizer.load(opt_folder / "vocab.json")
    assert "\n" not in str(caught.value)


def test_vocabularies_that_cannot_write_every_document(tmp_path):
    vocab = gpt2_vocab(["</s>"])
    del vocab[BYTES[7]]
    with pytest.raises(UserError, match="all 256 bytes, found 1 missing among its 261 tokens"):
        Tokenizer.load(write_files(tmp_path, vocab))
    with pytest.raises(UserError, match="to start documents, found neither among its 261 tokens"):
        Tokenizer.load(write_files(tmp_path, gpt2_vocab([])))
