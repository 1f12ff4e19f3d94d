"""Classes that are missing, unknown or of two kinds, each named where it stands."""

import datasets
import pytest

from .images.conftest import expect_error
from .labelled import NAMED, NAMES, NUMBERS, TEXTS, build_tfds, rows_of, write_jsonl


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return build_tfds(tmp_path_factory.mktemp("tfds"), "named", "measured")


@pytest.mark.parametrize(
    ("labels", "pattern"),
    [
        ([0, 1, None], r"under 'label' in .*a\.jsonl, line 3, found none; correct it"),
        ([0, 1, 1.5], r"under 'label' in .*a\.jsonl, line 3, found float"),
        ([0, True, 2], r"under 'label' in .*a\.jsonl, line 2, found bool"),
        ([0, 1, 3], r"in 0\.\.2 in .*a\.jsonl, line 3, found 3; correct it, model\.num_classes"),
        ([0, -1, 1], r"in 0\.\.2 in .*a\.jsonl, line 2, found -1"),
        ([0, "bad", 1], r"the number of a class .*found the name 'bad' in .*a\.jsonl, line 2;"),
        (["bad", "good", 1], r"the name of a class in .*a\.jsonl, line 3, .*found the number 1;"),
        (["a", "b", "a"], r"in the training data as model\.num_classes, which is 3, found 2 cl"),
    ],
)
def test_classes_that_cannot_be(make_task_of, tmp_path, labels, pattern):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3], labels)
    expect_error(lambda: make_task_of(files=path, validation_fraction=0.0).source("train"), pattern)


def test_names_that_nobody_knows(make_task_of, tmp_path):
    files = write_jsonl(tmp_path / "a.jsonl", TEXTS, NAMED)
    other = write_jsonl(tmp_path / "b.jsonl", TEXTS[:2], ["good", "god"])
    task = make_task_of(files=files, validation_files=other)
    pattern = r"one of the 3 classes, found 'god' in .*b\.jsonl, line 2 \(did you mean 'good'\?\)"
    expect_error(lambda: task.source("validation"), pattern)
    task = make_task_of(files=files, classes=["good", "bad", "best"])
    expect_error(lambda: task.source("train"), "found 'neutral' in")
    mixed = write_jsonl(tmp_path / "c.jsonl", TEXTS[:2], ["good", 1])
    task = make_task_of(files=files, validation_files=mixed)
    pattern = r"the name of a class as in the first .*found the number 1 in .*c\.jsonl, line 2"
    expect_error(lambda: task.source("validation"), pattern)


def test_lines_and_columns_without_the_key(make_task_of, tmp_path, tfds_dir):
    files = write_jsonl(tmp_path / "a.jsonl", TEXTS, NAMED)
    rows_of(NAMED).to_parquet(tmp_path / "a.parquet")
    rows_of([1.5] * len(TEXTS)).to_parquet(tmp_path / "b.parquet")
    advice = "set data.label_key to the one that holds the class"
    for settings, pattern in (
        ({"files": files}, rf"the key 'clas' in .*line 1, found the keys label, text; {advice}"),
        ({"files": f"{tmp_path}/a.parquet"}, rf"the column 'clas' in .*a\.parquet, .*; {advice}"),
        ({"source": "tfds:named", "tfds_dir": tfds_dir}, rf"the feature 'clas' in .*; {advice}"),
    ):
        task = make_task_of(label_key="clas", **settings)
        expect_error(lambda task=task: task.source("train"), pattern)
    task = make_task_of(files=f"{tmp_path}/b.parquet")
    expect_error(lambda: task.source("train"), "'label' of .*b.parquet, found float64; set data.la")
    task = make_task_of(source="tfds:measured", tfds_dir=tfds_dir)
    expect_error(lambda: task.source("train"), "example 0 of the train split of .*found float;")


def test_rows_without_a_class(make_task_of, tmp_path):
    labels = [*NUMBERS[:-1], -1]  # as datasets have where there is no class
    rows_of(labels, datasets.ClassLabel(names=NAMES)).save_to_disk(tmp_path / "data")
    task = make_task_of(source=f"hf:{tmp_path}/data", validation_fraction=0.0)
    where = f"row {len(TEXTS) - 1} of the train split of the dataset .*data"
    expect_error(lambda: task.source("train"), f"{where}, found -1, which is none of its 3 classes")


def test_plain_text_has_no_classes(make_task_of, tmp_path):
    (tmp_path / "a.txt").write_text("the fox")
    task = make_task_of(files=f"{tmp_path}/a.txt")
    expect_error(lambda: task.source("train"), r"JSON lines or parquet .*found .*a\.txt, where no")
    task = make_task_of(source="embedded")
    expect_error(lambda: task.source("train"), "embedded corpus, which has none; set data.files to")


@pytest.mark.parametrize("classes", [["a", "b"], "abc", [1, 2, 3], {"0": "a"}])
def test_names_of_a_checkpoint_that_do_not_fit(make_task_of, classes):
    expect_error(lambda: make_task_of(classes=classes), "names of classes in the checkpoint as mod")
