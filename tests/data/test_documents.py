"""The documents of every source, their split, and every message about files."""

import bz2
import gzip
import io
import json
import logging
import lzma
import re
from pathlib import Path

import pytest

from quantizable_flax.data.text.document import Fields
from quantizable_flax.data.text.documents import iter_documents
from quantizable_flax.data.text.embedded import MIN_DOCSTRING_CHARS, _docstrings, embedded_documents
from quantizable_flax.data.text.files import MAX_DOCUMENT_CHARS
from quantizable_flax.data.text.json_lines import json_lines
from quantizable_flax.errors import UserError

from .texts import expect_error

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def write(path, documents, text_key="text"):
    opener = OPENERS.get(path.suffix.lower(), open)
    with opener(path, "wt", encoding="utf-8") as stream:
        if "json" in path.name.lower():
            stream.writelines(json.dumps({text_key: text}) + "\n" for text in documents)
        else:
            stream.write("\n\n".join(documents) + "\n")
    return str(path)


def all_documents(config):
    return [
        text for split in ("train", "validation") for text in iter_documents(config.data, split)
    ]


@pytest.mark.parametrize("packed", [*OPENERS, ".GZ"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".JSONL", ".Txt"])
def test_every_format_gives_the_same_documents(tmp_path, make_config, kind, packed):
    documents = ["Ein Dokument,\nzwei Zeilen — Straße", "a second one", "日本語", "the last"]
    path = write(tmp_path / f"part{kind}{packed}", documents)
    config = make_config(files=path, validation_files=write(tmp_path / "other.txt", ["else"]))
    assert list(iter_documents(config.data, "train")) == documents


def test_globs_are_sorted_and_overlaps_count_once(tmp_path, make_config):
    first = write(tmp_path / "a.txt", ["one"])
    write(tmp_path / "b.txt", ["two"])
    config = make_config(files=f"{tmp_path}/*.txt, {first}", validation_fraction=0)
    assert list(iter_documents(config.data, "train")) == ["one", "two"]


def test_split_is_disjoint_complete_and_independent_of_order(tmp_path, make_config, documents):
    config = make_config(files=write(tmp_path / "a.txt", documents))
    train = list(iter_documents(config.data, "train"))
    validation = list(iter_documents(config.data, "validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)
    # 200 documents at 0.2: 40 expected, standard deviation 5.7; four of them either way.
    assert 17 <= len(validation) <= 63
    other = make_config(files=write(tmp_path / "b.txt", ["a new one", *reversed(documents)]))
    assert set(iter_documents(other.data, "validation")) - {"a new one"} == set(validation)


def test_separate_validation_files_are_not_split(tmp_path, make_config, documents):
    train = write(tmp_path / "a.txt", documents[:150])
    validation = write(tmp_path / "b.txt", documents[150:])
    config = make_config(files=train, validation_files=validation)
    assert list(iter_documents(config.data, "train")) == documents[:150]
    assert list(iter_documents(config.data, "validation")) == documents[150:]


def test_text_without_blank_lines_is_streamed_in_pieces(tmp_path, make_config):
    lines = [f"line number {number}" for number in range(200_000)]
    config = make_config(files=write(tmp_path / "a.txt", ["\n".join(lines)]), validation_fraction=0)
    pieces = list(iter_documents(config.data, "train"))
    assert len(pieces) > 2
    assert max(map(len, pieces)) < MAX_DOCUMENT_CHARS + 30
    assert "\n".join(pieces).split("\n") == lines


def test_a_line_without_end_is_streamed_between_its_words(tmp_path, make_config):
    words = [f"word{number}" for number in range(300_000)]
    endless = "x" * (10 * MAX_DOCUMENT_CHARS)
    text = " ".join(words) + "\n\nanother document\n\n" + endless + "\n"
    config = make_config(files=write(tmp_path / "a.txt", [text]), validation_fraction=0)
    pieces = list(iter_documents(config.data, "train"))
    assert max(map(len, pieces)) <= 3 * MAX_DOCUMENT_CHARS  # two reads, and the rest of one
    assert " ".join(pieces).split()[: len(words)] == words
    assert "another document" in pieces
    assert "".join(pieces).endswith(endless)


def test_a_json_line_beyond_the_limit_is_refused():
    def read(length):
        lines = [json.dumps({"text": text}) + "\n" for text in ("first", "x" * length)]
        limit = len(json.dumps({"text": "x" * 900}) + "\n")
        stream = io.StringIO("".join(lines))
        return [text for text, *_ in json_lines(stream, Path("a.jsonl"), Fields("text"), limit)]

    assert read(900) == ["first", "x" * 900]
    with pytest.raises(UserError, match=r"at most \d+ characters in a\.jsonl, line 2, found more"):
        read(901)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", *map("b.jsonl{}".format, OPENERS)])
@pytest.mark.parametrize("content", [None, b"", b" \n\t\n\n"])
def test_shards_without_documents_are_passed_over(tmp_path, make_config, caplog, name, content):
    write(tmp_path / "a.txt", ["one", "two"])
    empty = tmp_path / name
    if content is None:
        empty.touch()
    else:
        with OPENERS.get(empty.suffix, open)(empty, "wb") as stream:
            stream.write(content)
    write(tmp_path / "c.txt", [""])
    config = make_config(files=f"{tmp_path}/*.*", validation_fraction=0)
    with caplog.at_level(logging.WARNING):
        texts = [list(iter_documents(config.data, "train")) for _ in range(2)]
    assert texts == [["one", "two"]] * 2
    (message,) = [r.getMessage() for r in caplog.records if "quantizable_flax" in r.name]
    assert message.startswith("2 of 3 ")
    assert message.endswith(str(empty))
    config.data.files = f"{empty},{tmp_path}/c.txt"
    expect_error(config, f"expected text in {empty}, found no document there nor in 1 more")


def test_lone_surrogates_and_byte_order_marks_do_not_reach_the_tokenizer(tmp_path, make_config):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "bad \\ud800 escape"}\n')
    config = make_config(files=str(path), validation_fraction=0)
    assert list(iter_documents(config.data, "train")) == ["bad ? escape"]


def test_embedded_corpus_is_english_prose_from_this_interpreter(make_config):
    config = make_config(validation_fraction=0.05)
    documents = all_documents(config)
    assert sorted(documents) == sorted(embedded_documents())
    assert len(set(documents)) == len(documents)
    text = "\n".join(documents)
    # A trimmed distribution may lack topics or modules, never most of them.
    assert len(text) > 1_000_000
    assert text.lower().count(" the ") > 10_000
    assert list(iter_documents(config.data, "validation"))


def test_docstrings_are_parsed_not_executed_in_source_order(tmp_path):
    long = "x" * MIN_DOCSTRING_CHARS
    module = tmp_path / "module.py"
    module.write_text(
        f'"""module {long}"""\nraise SystemExit\n'
        f'class A:\n    """class {long}"""\n    def f(self):\n        r"""\\d method {long}"""\n'
        f'async def g():\n    """\\d function {long}"""\ndef h():\n    """short"""\n'
    )
    found = [text.replace(long, "").strip() for text in _docstrings(module)]
    assert found == ["module", "class", r"\d method", r"\d function"]
    module.write_text("def (:")
    assert _docstrings(module) == []


@pytest.mark.parametrize(
    ("source", "hint"), [("embeded", "did you mean 'embedded'"), ("tfds:", "among auto")]
)
def test_unknown_source(make_config, source, hint):
    expect_error(make_config(source=source), hint)


def test_unknown_split(make_config):
    expect_error(make_config(), "did you mean 'train'", split="training")


def test_files_source_without_files(make_config, tmp_path):
    expect_error(make_config(source="files"), "expected data.files")
    lonely = write(tmp_path / "a.txt", ["text"])
    expect_error(make_config(source="embedded", files=lonely), "leave one of them out")
    expect_error(make_config(files=" , "), "name at least one file")


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ("missing.txt", "found nothing there"),
        ("*.jsonl", "found none; correct the glob"),
        (".", "found the directory"),
        ("table.csv", r"in one of \.txt, .* one of \.gz, .* behind, found .*table\.csv"),
        ("table.jsn.gz", "convert or rename it"),
        ("empty.txt", r"empty\.txt, found no document"),
        ("blank.txt", r"blank\.txt, found no document"),
        ("latin.txt", r"expected UTF-8 text in .*latin\.txt"),
        ("broken.jsonl", r"broken\.jsonl, line 3, found invalid JSON"),
        ("list.jsonl", r"list\.jsonl, line 2, found list"),
        ("array.json", r"array\.json, line 1, found an array; write each of its objects"),
        ("pretty.json", r"pretty\.json, line 1, found invalid JSON .* write the object on one"),
        ("digits.jsonl", r"digits\.jsonl, line 1, found invalid JSON"),
        ("keys.jsonl", r"key 'text' in .*line 1, found the keys body, title; set data.text_key"),
        ("number.jsonl", r"number\.jsonl, line 1, found int"),
    ],
)
def test_bad_files(tmp_path, make_config, files, pattern):
    contents = {
        "table.csv": b"a,b",
        "table.jsn.gz": b"",
        "empty.txt": b"",
        "blank.txt": b"\n \n\n",
        "latin.txt": "Straße".encode("latin-1"),
        "broken.jsonl": b'{"text": "a"}\n\n{"text": \n',
        "list.jsonl": b'{"text": "a"}\n[1]\n',
        "array.json": b'[\n{"text": "a"},\n{"text": "b"}]',
        "pretty.json": b'{\n  "text": "a"\n}\n',
        "digits.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
        "keys.jsonl": b'{"title": "a", "body": "b"}\n',
        "number.jsonl": b'{"text": 3}\n',
    }
    if files in contents:
        (tmp_path / files).write_bytes(contents[files])
    expect_error(make_config(files=str(tmp_path / files)), pattern)


@pytest.mark.parametrize("packed", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_damaged_archives(tmp_path, make_config, documents, packed, damage):
    path = tmp_path / f"a.txt{packed}"
    write(path, documents)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"plain text")
    path.write_bytes(content)
    name = re.escape(path.name)
    expect_error(make_config(files=str(path)), f"{name}, found (it truncated or corrupt|a byte)")


def test_too_few_documents_for_a_validation_split(tmp_path, make_config):
    config = make_config(files=write(tmp_path / "a.txt", ["one"]), validation_fraction=0.0)
    expect_error(config, "none among 1 .* set data.validation_files", split="validation")
    config.data.validation_fraction = 1.5
    expect_error(config, r"in \[0, 1\), found 1.5")


def test_a_file_in_both_splits_is_refused(tmp_path, make_config):
    path = write(tmp_path / "a.txt", ["one"])
    config = make_config(files=f"{tmp_path}/*.txt", validation_files=path)
    expect_error(config, "a.txt in both", split="validation")


def test_validation_files_serve_embedded_training_text_too(tmp_path, make_config):
    config = make_config(validation_files=write(tmp_path / "mine.txt", ["my own words"]))
    assert list(iter_documents(config.data, "validation")) == ["my own words"]
    shared = make_config()
    parts = (list(iter_documents(shared.data, split)) for split in ("train", "validation"))
    assert len(list(iter_documents(config.data, "train"))) == sum(map(len, parts))
