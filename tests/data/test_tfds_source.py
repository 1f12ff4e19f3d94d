"""Reading what TFDS really wrote, and every message about what is not there."""

import importlib.util
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from quantizable_flax.data import tfds_source
from quantizable_flax.errors import UserError

from .tfds_builders import as_tfrecord, build

ROOT = Path(__file__).parents[2]
TEXTS = [f"text number {number} — Straße" for number in range(30)]


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Returns a TFDS folder with `notes` (two versions), `pets/cats`, `pets/dogs`, `old`."""
    path = str(tmp_path_factory.mktemp("tfds"))
    build(path, "notes", {"train": TEXTS[:5]}, version="1.9.0")
    build(path, "notes", {"train": TEXTS, "test": TEXTS[:3]}, version="1.10.0")
    features = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(names=["tabby", "siamese"]),
    }
    examples = [{"image": io.BytesIO(png(value)), "label": value % 2} for value in range(6)]
    build(path, "pets", {"train": examples}, features=features, config="cats")
    build(path, "pets", {"train": TEXTS}, config="dogs")
    as_tfrecord(build(path, "old", {"train": TEXTS}))
    return path


def test_examples_are_those_that_were_built(data_dir):
    source = tfds_source.open_split("notes", "train", data_dir)
    texts = [source[index]["text"].decode() for index in range(len(source))]
    assert sorted(texts) == sorted(TEXTS)
    assert [source[index]["text"].decode() for index in (7, 7, 2)] == [texts[7], texts[7], texts[2]]
    assert len(tfds_source.open_split("notes", "train[:10%]", data_dir)) == 3


def test_a_source_pickles(data_dir):
    source = tfds_source.open_split("notes", "train", data_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[index] for index in range(30)] == [source[index] for index in range(30)]


def test_images_stay_encoded_and_only_the_asked_features_are_read(data_dir):
    source = tfds_source.open_split("pets/cats", "train", data_dir, undecoded=["image"])
    found = {(source[index]["image"], source[index]["label"]) for index in range(6)}
    assert found == {(png(value), value % 2) for value in range(6)}
    labels = tfds_source.open_split("pets/cats", "train", data_dir, only=["label"])
    assert [example.keys() for example in (labels[0], labels[5])] == [{"label"}] * 2


def test_a_dataset_is_described_by_its_metadata(data_dir):
    assert tfds_source.split_names("notes", data_dir) == ["train", "test"]
    assert tfds_source.class_names("pets/cats", data_dir, "label") == ["tabby", "siamese"]
    assert tfds_source.class_names("pets/cats", data_dir, "image") is None
    assert tfds_source.feature_names("pets/cats", data_dir) == ["image", "label"]
    described = tfds_source.describe_split("notes", "train", data_dir)
    assert described.pop("bytes") > sum(map(len, TEXTS))
    assert described == {
        "source": "tfds",
        "name": "notes",
        "version": "1.10.0",
        "config": "",
        "split": "train",
        "examples": 30,
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [("notes", 30), ("notes:1.9.0", 5), ("notes:1.10.0", 30), ("pets/dogs/1.0.0", 30)],
)
def test_the_newest_version_unless_one_is_named(data_dir, name, count):
    assert len(tfds_source.open_split(name, "train", data_dir)) == count


def test_the_folder_follows_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(tfds_source.open_split("notes:1.9.0", "train", None)) == 5


@pytest.mark.parametrize(
    ("name", "split", "pattern"),
    [
        ("not a name", "train", "such as lm1b, wiki40b/en .* found 'not a name'"),
        ("note", "train", r"old, pets there \(did you mean 'notes'\?\); build it, with tensorflow"),
        ("wiki40b/en", "train", "tfds build wiki40b/en --data_dir={0} --file_format=array_record"),
        ("pets", "train", "a configuration of the TFDS dataset pets .* cats, dogs"),
        ("pets/cat", "train", r"did you mean 'cats'\?.* tfds build pets/cat --data_dir={0} "),
        ("notes:2.0.0", "train", "version 2.0.0 .* found 1.9.0, 1.10.0; ask for one of these"),
        ("notes", "tests", r"found 'tests' \(did you mean 'test'\?\); it has train, test"),
        ("notes", "train[", r"found 'train\['"),
    ],
)
def test_what_is_not_there(data_dir, name, split, pattern):
    with pytest.raises(UserError, match=pattern.format(re.escape(data_dir))) as caught:
        tfds_source.open_split(name, split, data_dir)
    assert "\n" not in str(caught.value)


def test_an_empty_or_missing_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="found no dataset there; build it"):
            tfds_source.split_names("lm1b", str(folder))


def test_missing_features(data_dir):
    pattern = "'img' in the TFDS dataset pets/cats, found image, label .did you mean 'image'"
    for wanted in ({"undecoded": ["img"]}, {"only": ["img"]}):
        with pytest.raises(UserError, match=pattern):
            tfds_source.open_split("pets/cats", "train", data_dir, **wanted)
    with pytest.raises(UserError, match=r"'lable' in .* found image, label \(did you mean 'label'"):
        tfds_source.class_names("pets/cats", data_dir, "lable")


def test_tfrecord_names_the_command_that_converts_it(data_dir):
    folder = f"{data_dir}/old/1.0.0"
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    with pytest.raises(UserError, match=f"only tfrecord in {folder}.*: {command}$"):
        tfds_source.open_split("old", "train", data_dir)
    # The command itself needs TensorFlow; that it still has these options does not.
    spec = importlib.util.find_spec("tensorflow_datasets")
    text = Path(spec.origin).parent.joinpath("scripts/cli/convert_format.py").read_text()
    assert {"  dataset_version_dir", "  out_file_format"} <= set(re.findall(r"(?m)^  \w+", text))


def test_damaged_datasets(tmp_path):
    folder = build(str(tmp_path), "gone", {"train": TEXTS})
    (shard,) = folder.glob("*array_record*")
    shard.unlink()
    with pytest.raises(UserError, match=r"found 1 of 1 missing, gone-train\.array_record-00000-of"):
        tfds_source.open_split("gone", "train", str(tmp_path))
    folder = build(str(tmp_path), "torn", {"train": TEXTS})
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata that cannot be read .* tfds build torn"):
        tfds_source.split_names("torn", str(tmp_path))


def test_tensorflow_is_not_imported(data_dir):
    script = (
        "import sys; from quantizable_flax.data import tfds_source\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"source = tfds_source.open_split('pets/cats', 'train', {data_dir!r}, only=['image'], "
        "undecoded=['image'])\n"
        "assert source[3]['image'][1:4] == b'PNG'\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
