"""Datasets as `datasets` itself writes them, without a network, and every message about them."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest

from quantizable_flax.data import hub
from quantizable_flax.errors import UserError

ROOT = Path(__file__).parents[2]
ROWS = {"text": [f"text number {number} — Straße" for number in range(30)], "id": list(range(30))}
CONFIGS = (
    "---\nconfigs:\n- config_name: en\n  data_files: en/*.parquet\n"
    "- config_name: de\n  data_files: de/*.parquet\n---\n"
)


@pytest.fixture
def saved(tmp_path):
    """Returns a folder that `save_to_disk` wrote."""
    rows = datasets.Dataset.from_dict(ROWS)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select(range(3))})
    splits.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.fixture
def repository(tmp_path):
    """Returns a folder as a dataset with two configurations has it on the hub."""
    folder = tmp_path / "repository"
    for name, count in (("en", 30), ("de", 20)):
        (folder / name).mkdir(parents=True)
        rows = datasets.Dataset.from_dict(ROWS).select(range(count))
        rows.to_parquet(folder / name / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(CONFIGS)
    return str(folder)


def expect_error(call, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rows_are_those_that_were_saved_in_any_order(saved, repository):
    for name in (saved, f"{repository},en", f"{repository} , en"):
        source = hub.open_split(name, "train", ("text", "id"))
        assert len(source) == 30
        for index in (7, 7, 2, 29):
            assert source[index] == {"text": ROWS["text"][index], "id": index}
    assert len(hub.open_split(f"{repository},de", "train", ("id",))) == 20
    assert hub.open_split(saved, "test", ("id",))[2] == {"id": 2}


def test_a_source_is_mapped_and_pickles_as_its_files(saved):
    source = hub.open_split(saved, "train", ("text",))
    pickled = pickle.dumps(source)
    assert saved.encode() in pickled
    assert not any(text.encode() in pickled for text in ROWS["text"])
    copy = pickle.loads(pickled)
    assert [copy[index] for index in range(30)] == [source[index] for index in range(30)]


def test_a_dataset_that_was_saved_alone_is_the_training_split(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "alone")
    assert hub.split_names(str(tmp_path / "alone")) == ["train"]


def test_what_columns_hold(tmp_path):
    features = datasets.Features(
        {
            "a": datasets.Value("large_string"),
            "b": datasets.Image(),
            "c": datasets.ClassLabel(names=["x", "y"]),
            "d": datasets.Value("uint8"),
            "e": datasets.Value("float32"),
            "f": datasets.List(datasets.Value("int64")),
        }
    )
    row = {"a": ["t"], "b": [None], "c": [1], "d": [3], "e": [0.5], "f": [[1, 2]]}
    datasets.Dataset.from_dict(row, features=features).save_to_disk(tmp_path / "all")
    name = str(tmp_path / "all")
    kinds = ["text", "image", "classes", "integers", "float32", "List"]
    assert list(hub.columns(name, "train").values()) == kinds
    assert hub.class_names(name, "train", "c") == ["x", "y"]
    assert hub.class_names(name, "train", "d") is None
    assert hub.open_split(name, "train", ("b",))[0] == {"b": b""}


def test_a_saved_dataset_is_described_by_its_content_not_its_place(saved, tmp_path):
    described = hub.describe_split(saved, "train")
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert hub.describe_split(str(moved), "train") == described
    assert hub.describe_split(saved, "test") != described
    others = {"text": ROWS["text"][::-1], "id": ROWS["id"]}
    datasets.Dataset.from_dict(others).save_to_disk(tmp_path / "others")
    assert hub.describe_split(str(tmp_path / "others"), "train") != described


@pytest.mark.parametrize("name", ["{},en", "{}/en"])
def test_changed_files_of_a_folder_are_read_anew(repository, name):
    name = name.format(repository)
    described = hub.describe_split(name, "train")
    Path(repository, ".git").mkdir()
    Path(repository, ".git", "index").touch()
    Path(repository, "nowhere").symlink_to("gone")
    hub.opened.cache_clear()
    assert hub.describe_split(name, "train") == described
    path = Path(repository, "en", "train-00000-of-00001.parquet")
    rows = {"text": ROWS["text"][::-1], "id": ROWS["id"]}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    os.utime(path, ns=(1, 1))
    hub.opened.cache_clear()  # as another process
    assert hub.describe_split(name, "train") != described
    assert hub.open_split(name, "train", ("text",))[0] == {"text": ROWS["text"][-1]}


def test_images_in_a_zip_file_are_read_where_they_lie(tmp_path):
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        archive.writestr("metadata.jsonl", '{"file_name": "a.png", "label": 1}')
        archive.writestr("a.png", b"not decoded here")
    source = hub.open_split(str(tmp_path / "zipped"), "train", ("image", "label"))
    assert source[0] == {"image": b"not decoded here", "label": 1}
    (tmp_path / "zipped" / "train.zip").unlink()
    expect_error(lambda: source[0], r"able to read the image zip://a\.png::.*train\.zip of a data")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("{repository}", "a configuration of the dataset .*found none; write hf:.*,CONFIG .*en, d"),
        ("{repository},end", r"found 'end' \(did you mean 'en'\?\); write .* with one of en, de$"),
        ("{saved},en", "no configuration of .*, which save_to_disk wrote, found 'en'"),
        ("{saved}/test/state.json", "found the file .*state.json; name it in data.files"),
        ("{saved}/none", "in the folder .*none of data.source, found nothing there; correct the p"),
        ("~/no_such_folder", "in the folder ~/no_such_folder of data.source, found nothing"),
        ("someone/something", "in the cache .* found none .*Offline.*correct the name, or fetch"),
        ("json", "on the Hugging Face hub, found neither .json is the name of a format"),
    ],
)
def test_what_is_not_there(saved, repository, name, pattern, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the library looks for files of a format below it
    name = name.format(saved=saved, repository=repository)
    expect_error(lambda: hub.split_names(name), pattern)


def test_splits_that_are_not_there(saved):
    expect_error(
        lambda: hub.columns(saved, "tests"),
        r"the split 'tests' in the dataset .* found train, test \(did you mean 'test'\?\)",
    )


def test_damaged_datasets(saved, tmp_path):
    Path(saved, "train", "state.json").write_text("{")
    expect_error(lambda: hub.split_names(saved), "able to read the dataset .* found JSONDecodeErr")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(b"PAR1")
    expect_error(lambda: hub.split_names(str(tmp_path / "torn")), "found ArrowInvalid .Parquet")
    (tmp_path / "empty").mkdir()
    expect_error(lambda: hub.split_names(str(tmp_path / "empty")), "doesn't contain any data files")


def test_the_missing_library_is_named_with_its_extra(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    expect_error(lambda: hub.split_names(saved), r"pip install 'quantizable_flax\[hub\]'$")


def test_local_data_ask_no_network_and_the_library_is_imported_when_it_is_used(saved, repository):
    script = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): raise AssertionError('the network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "import quantizable_flax\n"
        "from quantizable_flax.data import hub, tasks\n"
        "assert 'datasets' not in sys.modules\n"
        f"print(len(hub.open_split({saved!r}, 'train', ['text'])))\n"
        f"print(len(hub.open_split({repository + ',de'!r}, 'train', ['text'])))\n"
        f"print(len(list(hub.parquet_rows({repository!r} + "
        "'/en/train-00000-of-00001.parquet', ['id']))))\n"
        "assert not {'torch', 'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=online)
    assert (done.returncode, done.stdout, done.stderr) == (0, "30\n20\n30\n", "")


def test_what_was_fetched_before_is_read_from_the_cache_without_a_network(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    local = str(shutil.copytree(repository, tmp_path / "something"))
    for config in ("en", "de"):
        datasets.load_dataset(local, config)
    # As the library calls what it fetched from the hub.
    (tmp_path / "cache" / "something").rename(tmp_path / "cache" / "someone___something")
    assert len(hub.open_split("someone/something,de", "train", ("text",))) == 20
    source = hub.open_split("someone/something,en", "train", ("text",))
    assert [row["text"] for row in map(source.__getitem__, range(30))] == ROWS["text"]
    expect_error(lambda: hub.split_names("someone/something,fr"), "'fr'")
    expect_error(lambda: hub.split_names("someone/something"), "in the cache: de, en.*,CONFIG")
