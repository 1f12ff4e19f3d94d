"""Packing loses nothing, and its cache is never trusted too much."""

import itertools
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quantizable_flax.data.text.documents import iter_documents
from quantizable_flax.data.text.packing import packed_tokens
from quantizable_flax.data.text.pieces import PIECE_CHARS, pieces
from quantizable_flax.errors import UserError


def expected_stream(config, tokenizer, split):
    texts = list(iter_documents(config.data, split))
    ids = tokenizer.encode_batch(texts)
    before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
    return [token for document in ids for token in (*before, *document, *after)]


def write_other_text(path):
    """As long and as old as the text that is there: whoever reads it finds other tokens."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Through:
    """A tokenizer that does as another one does, and something before it."""

    def __init__(self, tokenizer, before):
        self._tokenizer, self._before = tokenizer, before

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts):
        self._before()
        return self._tokenizer.encode_batch(texts)


def cache_files(config):
    return sorted(Path(config.data.cache_dir).glob("*"))


@pytest.mark.parametrize("seq_len", [2, 7, 16, 128])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("batch_chars", [1, 300, 1 << 20])
def test_nothing_is_lost_but_the_remainder(text_config, tokenizer, seq_len, split, batch_chars):
    config = text_config(seq_len=seq_len)
    tokens_NxT = packed_tokens(config.data, tokenizer, split, batch_chars=batch_chars)
    stream = expected_stream(config, tokenizer, split)
    assert tokens_NxT.shape == (len(stream) // seq_len, seq_len)
    assert tokens_NxT.ravel().tolist() == stream[: tokens_NxT.size]


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_long_documents_have_the_tokens_that_they_have_whole(
    make_config, tokenizer, byte_tokenizer, tmp_path, family
):
    kept = tokenizer if family == "bert" else byte_tokenizer
    text = long_text(4000)
    cut = list(pieces(text, 100))
    assert max(map(len, cut)) <= 100
    assert list(itertools.chain(*kept.encode_batch(cut))) == kept.encode_batch([text])[0]
    long = long_text(120_000)
    assert len(list(pieces(long))) > 2
    lines = [json.dumps({"text": text}) for text in ("a short one", long, "the last")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = str(tmp_path / "a.jsonl")
    config = make_config(family, files=files, validation_fraction=0.0, seq_len=7)
    tokens_NxT = packed_tokens(config.data, kept, "train")
    stream = expected_stream(config, kept, "train")
    assert tokens_NxT.ravel().tolist() == stream[: tokens_NxT.size]


def long_text(count):
    """So many words of several kinds with white space of several kinds between them."""
    rng = np.random.default_rng(0)
    spaces = [" ", "  ", "\n", " \n", "\t", "\n\n ", "\u00a0", "\r\n"]
    words = ["the", "fox", "don't", "1999", "—", "...", "Straße", "e\u0301", "日本語", "🦊"]
    parts = rng.choice(words, count), rng.choice(spaces, count)
    return "".join(word + space for word, space in zip(*parts, strict=True)).strip()


def test_a_long_word_is_cut_and_nothing_of_it_lost():
    for text in ("x" * 1000, " " * 1000, "x" + " " * 300 + "y" * 300, ""):
        cut = list(pieces(text, 100))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 100
    assert list(map(len, pieces("x" * (PIECE_CHARS + 1)))) == [PIECE_CHARS, 1]


def test_the_memory_of_a_long_line_is_a_few_times_its_size(tmp_path, tokenizer):
    text = "the quick brown fox jumps over a lazy dog " * 90_000
    (tmp_path / "line.txt").write_text(text)
    with lzma.open(tmp_path / "line.jsonl.xz", "wt", preset=0) as stream:
        json.dump({"text": text}, stream)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    script = (
        "import resource, sys\n"
        "from quantizable_flax.data.text.packing import packed_tokens\n"
        "from quantizable_flax.data.text.tokenizer import Tokenizer\n"
        "from quantizable_flax.config.defaults import data_defaults\n"
        "config, folder = data_defaults('bert'), sys.argv[1]\n"
        "config.update(cache_dir=folder, validation_fraction=0.0)\n"
        "tokenizer = Tokenizer.load(folder + '/tokenizer.json')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "for name in ('line.txt', 'line.jsonl.xz'):\n"
        "    config.files = folder + '/' + name\n"
        "    packed_tokens(config, tokenizer, 'train')\n"
        "    print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    # 3.8 MB of text; 80 MB are the tokens of a batch. Those of the whole line took 440 MB.
    assert max(map(int, result.stdout.split())) < 200, result.stdout


def test_small_vocabularies_take_two_bytes_and_large_ones_four(text_config, tokenizer):
    config = text_config()
    small = packed_tokens(config.data, tokenizer, "train")

    class Large:
        vocab_size = (1 << 16) + 1
        prefix_ids, suffix_ids = (1 << 16,), (3,)

        def to_json(self):
            return "large"

        def encode_batch(self, texts):
            return tokenizer.encode_batch(texts)

    large = packed_tokens(config.data, Large(), "train")
    assert (small.dtype, large.dtype) == (np.uint16, np.int32)
    assert large.max() == 1 << 16
    np.testing.assert_array_equal(small == tokenizer.prefix_ids[0], large == 1 << 16)


def test_the_array_is_mapped_and_read_only(text_config, tokenizer):
    tokens_NxT = packed_tokens(text_config().data, tokenizer, "train")
    assert isinstance(tokens_NxT, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens_NxT[0, 0] = 1


def test_the_second_call_reads_no_text(text_config, tokenizer):
    config = text_config()
    first = packed_tokens(config.data, tokenizer, "train")
    write_other_text(Path(config.data.files))
    np.testing.assert_array_equal(packed_tokens(config.data, tokenizer, "train"), first)


def test_whatever_changes_the_tokens_changes_the_cache(text_config, tokenizer, documents):
    config = text_config()
    packed_tokens(config.data, tokenizer, "train")
    path = Path(config.data.files)
    changes = [
        lambda: config.data.update(seq_len=17),
        lambda: config.data.update(validation_fraction=0.3),
        lambda: path.write_text("\n\n".join(documents[::-1])),
        lambda: os.utime(path, ns=(1, 1)),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        tokens_NxT = packed_tokens(config.data, tokenizer, "train")
        assert len(cache_files(config)) == count
        stream = expected_stream(config, tokenizer, "train")
        assert tokens_NxT.ravel().tolist() == stream[: tokens_NxT.size]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "header", "foreign"])
def test_a_damaged_cache_is_built_again(text_config, tokenizer, damage, caplog):
    config = text_config()
    first = np.array(packed_tokens(config.data, tokenizer, "train"))
    (path,) = cache_files(config)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    replacement = {
        "truncated": content[:-10],
        "flipped": content,
        "empty": b"",
        "header": b"[1]" + content[3:],
        "foreign": b'{"a": 1}'.ljust(600),
    }
    path.write_bytes(replacement[damage])
    np.testing.assert_array_equal(packed_tokens(config.data, tokenizer, "train"), first)
    assert str(path) in caplog.messages[-1]
    assert cache_files(config) == [path]


def test_a_file_is_read_whole_when_its_time_is_not_its_own(text_config, tokenizer, caplog):
    config = text_config()
    first = np.array(packed_tokens(config.data, tokenizer, "train"))
    (path,) = cache_files(config)
    stamp = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stamp, stamp))
    # Nothing tells of a change: its last bytes are taken as they are, not read at every start.
    assert (packed_tokens(config.data, tokenizer, "train") != first).sum() == 1
    assert not caplog.messages
    os.utime(path)
    np.testing.assert_array_equal(packed_tokens(config.data, tokenizer, "train"), first)
    assert str(path) in caplog.messages[-1]
    assert "checksum" in caplog.messages[-1]


def test_a_copy_of_the_file_is_as_good(text_config, tokenizer):
    config = text_config()
    first = np.array(packed_tokens(config.data, tokenizer, "train"))
    (path,) = cache_files(config)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    write_other_text(Path(config.data.files))
    np.testing.assert_array_equal(packed_tokens(config.data, tokenizer, "train"), first)


def test_of_builds_at_the_same_time_one_reads_the_text(text_config, tokenizer, caplog):
    config = text_config()
    reads, begun = [], threading.Event()

    def wait_for_the_others():
        reads.append(threading.get_ident())
        begun.set()
        deadline = time.monotonic() + 30
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    slow = Through(tokenizer, wait_for_the_others)
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(packed_tokens, config.data, slow, "train")]
        begun.wait(30)
        builds += [pool.submit(packed_tokens, config.data, slow, "train") for _ in range(2)]
        found = [build.result() for build in builds]
    assert len(caplog.messages) == 2  # both say for whom they wait
    assert all(f" {os.getpid()} " in message for message in caplog.messages)
    assert len(reads) == 1
    for tokens_NxT in found:
        np.testing.assert_array_equal(tokens_NxT, found[0])
    assert len(cache_files(config)) == 1


def test_the_lock_of_a_build_that_was_killed_is_not_in_the_way(text_config, tokenizer):
    config = text_config()
    first = np.array(packed_tokens(config.data, tokenizer, "train"))
    (path,) = cache_files(config)
    path.rename(f"{path}.lock")
    np.testing.assert_array_equal(packed_tokens(config.data, tokenizer, "train"), first)
    assert cache_files(config) == [path]


def test_an_interrupted_build_leaves_nothing(text_config, tokenizer):
    config, batches = text_config(), []

    def interrupt_the_second():
        batches.append(cache_files(config))
        if len(batches) == 2:
            raise KeyboardInterrupt

    interrupted = Through(tokenizer, interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        packed_tokens(config.data, interrupted, "train", batch_chars=500)
    assert len(batches) == 2
    assert batches[1]  # something was being written
    assert cache_files(config) == []
    assert len(packed_tokens(config.data, tokenizer, "train"))


def test_an_unwritable_cache_falls_back_to_memory(text_config, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    config = text_config(cache_dir=str(tmp_path / "file" / "below"))
    in_memory = packed_tokens(config.data, tokenizer, "train")
    assert f"{tmp_path / 'file' / 'below'} " in caplog.messages[-1]
    assert "data.cache_dir" in caplog.messages[-1]
    on_disk = packed_tokens(text_config().data, tokenizer, "train")
    np.testing.assert_array_equal(in_memory, on_disk)
    assert not in_memory.flags.writeable


def test_the_cache_folder_follows_the_environment(text_config, tokenizer, tmp_path):
    packed_tokens(text_config(cache_dir=None).data, tokenizer, "train")
    assert list((tmp_path / "xdg" / "quantizable_flax").glob("train-*.tokens"))


def test_no_progress_bar_without_a_terminal(text_config, tokenizer, capfd):
    packed_tokens(text_config().data, tokenizer, "train")
    assert capfd.readouterr() == ("", "")


def test_too_little_text_for_a_block(text_config, tokenizer):
    config = text_config(seq_len=100_000)
    count = len(expected_stream(config, tokenizer, "train"))
    with pytest.raises(
        UserError, match=rf"seq_len=100000 tokens .* found {count} in \d+ documents"
    ):
        packed_tokens(config.data, tokenizer, "train")
    assert cache_files(config) == []


def test_a_senseless_block_length(text_config, tokenizer):
    with pytest.raises(UserError, match="at least 2, found 1"):
        packed_tokens(text_config(seq_len=1).data, tokenizer, "train")
