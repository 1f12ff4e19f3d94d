"""Text of the Hugging Face hub and of parquet files gives the batches of the same JSON lines."""

import json
import shutil
from fractions import Fraction

import datasets
import numpy as np
import pytest

from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.text import packing
from quantizable_flax.data.text.corpora import corpora

from .batches import assert_continues, assert_same, take
from .conftest import random_documents
from .texts import documents, expect_error

TEXTS = random_documents(300, seed=4)


def rows(texts):
    return datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})


def save(path, **splits):
    """Saves texts by split and returns the source that names them."""
    datasets.DatasetDict({k: rows(v) for k, v in splits.items()}).save_to_disk(path)
    return f"hf:{path}"


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def places(tmp_path):
    """Returns the settings for the same documents as JSON lines, parquet and datasets."""
    rows(TEXTS).to_parquet(tmp_path / "a.parquet", batch_size=7)
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "folder" / "train.parquet")
    return {
        "jsonl": {"files": write_jsonl(tmp_path / "a.jsonl", TEXTS)},
        "parquet": {"files": str(tmp_path / "a.parquet")},
        "saved": {"source": save(tmp_path / "saved", train=TEXTS)},
        "folder": {"source": f"hf:{tmp_path}/folder"},
    }


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_batches_are_those_of_the_same_json_lines(places, make_config, make_text_task, family):
    found = {}
    for place, settings in places.items():
        task = make_text_task(make_config(family, **settings))
        found[place] = take(train_iterator(task, batch_size=4, seed=3), 20)
        assert np.stack(list(task.source("validation"))).size
    for batches in found.values():
        for left, right in zip(batches, found["jsonl"], strict=True):
            assert_same(left, right)


@pytest.mark.parametrize("place", ["saved", "parquet"])
def test_a_run_continues_exactly_also_where_the_data_moved(
    places, make_config, make_text_task, tmp_path, place
):
    task = make_text_task(make_config(**places[place]))
    batches = train_iterator(task, batch_size=4, seed=3)
    take(batches, 5)
    state, expected = batches.get_state(), take(batches, 6)
    if place == "saved":
        moved = {"source": f"hf:{shutil.move(tmp_path / 'saved', tmp_path / 'moved')}"}
    else:
        moved = {"files": str(shutil.move(tmp_path / "a.parquet", tmp_path / "b.parquet"))}
    again = make_text_task(make_config(**moved))
    assert_continues(task, state, expected, again)
    other = make_text_task(make_config(source=save(tmp_path / "other", train=TEXTS[::-1])))
    assert difference(task.fingerprint, other.fingerprint, task.unit)


def test_moved_datasets_find_their_packed_tokens(places, make_config, tokenizer, tmp_path):
    packed = packing.packed_tokens(make_config(**places["saved"]).data, tokenizer, "train")
    moved = shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    config = make_config(source=f"hf:{moved}")
    again = packing.packed_tokens(config.data, tokenizer, "train")
    np.testing.assert_array_equal(again, packed)
    assert again.filename == packed.filename


@pytest.mark.parametrize("held_out", ["validation", "val", "valid", "test"])
def test_the_splits_of_the_dataset_are_taken(make_config, tmp_path, held_out):
    splits = {"train": TEXTS[:60], held_out: TEXTS[60:80]}
    config = make_config(source=save(tmp_path / "data", **splits))
    assert documents(config) == TEXTS[:60]
    assert documents(config, "validation") == TEXTS[60:80]


def test_a_dataset_with_train_only_is_shared_by_hash(make_config, tmp_path):
    shared = make_config(source=save(tmp_path / "data", train=TEXTS))
    as_files = make_config(files=write_jsonl(tmp_path / "a.jsonl", TEXTS))
    for split in ("train", "validation"):
        assert documents(shared, split) == documents(as_files, split)
    mine = write_jsonl(tmp_path / "mine.jsonl", ["my own words"])
    shared.data.validation_files = mine
    assert documents(shared) == TEXTS
    assert documents(shared, "validation") == ["my own words"]


def test_rows_without_text_are_passed_over_and_space_around_it(make_config, tmp_path):
    texts = ["one", None, "", " \n", "\n two\n\nparagraphs \t"]
    rows(texts).to_parquet(tmp_path / "a.parquet")
    for settings in (
        {"source": save(tmp_path / "data", train=texts)},
        {"files": str(tmp_path / "a.parquet")},
    ):
        config = make_config(**settings, validation_fraction=0)
        assert documents(config) == ["one", "two\n\nparagraphs"]


def test_corpora_mix_with_others(make_config, make_text_task, tmp_path):
    greek = ["αβγδε ζηθ"] * 90
    files = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = save(tmp_path / "greek", train=greek)
    both = make_config("opt", source=f"{source},files", files=files, validation_fraction=0)
    assert documents(both) == greek + TEXTS
    mixed = make_config("opt", source=f"{source}*0.25,files*0.75", files=files)
    alone = make_text_task(make_config("opt", source=source)).source("train")
    blocks = {row.tobytes() for row in alone}
    task = make_text_task(mixed)
    found = np.mean([row.tobytes() in blocks for row in task.source("train")])
    assert found == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("hf:a/b,en", ["hf:a/b,en"]),
        (" hf:a/b , 20231101.en , tfds:c4/en", ["hf:a/b,20231101.en", "tfds:c4/en"]),
        ("hf:a,hf:b,x,embedded", ["hf:a", "hf:b,x", "embedded"]),
        ("tfds:c4/en,hf:a", ["tfds:c4/en", "hf:a"]),
    ],
)
def test_a_configuration_stands_behind_a_comma(make_config, source, names):
    assert [part.name for part in corpora(make_config(source=source).data)] == names


def test_a_configuration_and_weights(make_config):
    config = make_config(source="hf:a/b,en*0.7, hf:c*0.2, files*0.1", files="x")
    assert [(part.name, part.weight) for part in corpora(config.data)] == [
        ("hf:a/b,en", Fraction(7, 10)),
        ("hf:c", Fraction(1, 5)),
        ("files", Fraction(1, 10)),
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hf:a,en,us", "'us'"),
        ("hf:a*0.5,en*0.5", "'en'"),
        ("hf:", "'hf:'"),
        ("hf:,en", "'hf:,en'"),
        ("hf:a,", "''"),
        ("tfds:lm1b,en", "'en'"),
    ],
)
def test_sources_that_make_no_sense(make_config, source, found):
    expect_error(make_config(source=source), rf"hf:NAME\[,CONFIG\], found {found}")


def test_columns_that_hold_no_text(make_config, tmp_path):
    source = save(tmp_path / "data", train=TEXTS)
    rows(TEXTS).to_parquet(tmp_path / "a.parquet")
    for settings in ({"source": source}, {"files": str(tmp_path / "a.parquet")}):
        expect_error(
            make_config(**settings, text_key="txt"),
            r"column 'txt' in .*(data|a\.parquet), found text, id \(did you mean 'text'\?\); set",
        )
        expect_error(
            make_config(**settings, text_key="id"),
            "text in the column 'id' of .* found integers; set data.text_key to .* text: text$",
        )


def test_damaged_and_empty_parquet_files_are_named(make_config, tmp_path):
    path = tmp_path / "a.parquet"
    rows(TEXTS).to_parquet(path)
    content = path.read_bytes()
    config = make_config(files=str(path), validation_fraction=0)
    # The head is of text, the middle of the numbers and of the index: those are not read.
    for damaged in (content[:-20], b"\xff" * 2000 + content[2000:], b"hello"):
        path.write_bytes(damaged)
        expect_error(config, rf"a whole parquet file in {path}, found it truncated or corrupt")
    for empty in (rows([]), None):
        path.write_bytes(b"")
        if empty is not None:
            rows([""]).to_parquet(path)
        expect_error(config, f"expected text in {path}, found no document there")
    expect_error(make_config(files=f"{path}.gz"), "found nothing there")
    (tmp_path / "a.parquet.gz").touch()
    expect_error(make_config(files=f"{path}.gz"), "ends in .parquet or in one of .txt")


def test_nothing_is_written_to_read_a_parquet_file(make_config, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = tmp_path / "a.parquet"
    rows(TEXTS).to_parquet(path)
    assert documents(make_config(files=str(path), validation_fraction=0)) == TEXTS
    assert not [name for name in cache.rglob("*.arrow") if name.is_file()]


def test_a_dataset_without_a_training_split(make_config, tmp_path):
    config = make_config(source=save(tmp_path / "data", test=TEXTS))
    expect_error(config, "the split 'train' in the dataset .*data, found test")
