"""Labelled text: every document with its class, wherever both come from."""

import json

import datasets
import pytest

from quantizable_flax.config import default_config
from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.documents import iter_documents

from .batches import assert_continues, joined, take
from .heads import SEQ_LEN, with_head
from .images.conftest import expect_error
from .labelled import NAMED, NAMES, NUMBERS, TEXTS, build_tfds, rows_of, write_jsonl


def labels_by_text(task, split="train"):
    """Returns the class of each text of a split, as its batches have it."""
    examples = joined(list(eval_batches(task, split=split, batch_size=7)))
    real = examples["example_weight"] == 1
    found = {}
    for ids_T, mask_T, label in zip(
        *(examples[name][real] for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        found[task.tokenizer.decode(ids_T[mask_T == 1])] = int(label)
    return found


def expected_labels(task, numbers, texts=TEXTS):
    tokenizer = task.tokenizer
    found = {}
    for ids, number in zip(tokenizer.encode_batch(list(texts)), numbers, strict=True):
        row = (*tokenizer.prefix_ids, *ids[: SEQ_LEN - 2], *tokenizer.suffix_ids)
        found[tokenizer.decode(row)] = number
    return found


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return build_tfds(folder, "declared", "counted", "named", "numbered")


@pytest.fixture
def places(tmp_path, tfds_dir):
    """Returns settings for the same documents, by how their classes are told."""
    declared = datasets.ClassLabel(names=NAMES)
    rows_of(NUMBERS, declared).to_parquet(tmp_path / "declared.parquet", batch_size=7)
    rows_of(NUMBERS).to_parquet(tmp_path / "numbered.parquet")
    rows_of(NAMED).to_parquet(tmp_path / "named.parquet")
    rows_of(NUMBERS, declared).save_to_disk(tmp_path / "declared")
    rows_of(NAMED).save_to_disk(tmp_path / "named")
    write_jsonl(tmp_path / "named.jsonl", TEXTS, NAMED)
    write_jsonl(tmp_path / "numbered.jsonl", TEXTS, NUMBERS)

    def of(kind):
        found = [{"files": str(path)} for path in tmp_path.glob(f"{kind}.*")]
        if (tmp_path / kind).is_dir():
            found.append({"source": f"hf:{tmp_path / kind}"})
        return [*found, {"source": f"tfds:{kind}", "tfds_dir": tfds_dir}]

    return of


@pytest.mark.parametrize(
    ("kind", "classes", "numbers"),
    [
        ("numbered", None, NUMBERS),
        ("declared", NAMES, NUMBERS),
        ("named", sorted(NAMES), [sorted(NAMES).index(name) for name in NAMED]),
    ],
)
def test_every_source_gives_each_text_its_class(places, make_task_of, kind, classes, numbers):
    settings = places(kind)
    assert len(settings) >= 3
    for setting in settings:
        task = make_task_of(**setting)
        found = labels_by_text(task) | labels_by_text(task, "validation")
        assert found == expected_labels(task, numbers)
        assert task.classes == classes
        expected = {"tokenizer"} if classes is None else {"tokenizer", "classes"}
        assert set(task.assets) == expected
        assert task.assets.get("classes") == classes


def test_numbers_in_other_words_are_no_names(make_task_of, tfds_dir):
    task = make_task_of(source="tfds:counted", tfds_dir=tfds_dir)
    assert task.classes is None
    assert labels_by_text(task) | labels_by_text(task, "validation") == expected_labels(
        task, NUMBERS
    )


@pytest.mark.parametrize("kind", ["named", "declared"])
def test_the_checkpoint_decides_the_order_of_the_names(places, make_task_of, kind):
    order = ["GOOD", "Bad", "neutral"]  # published models write them in other cases
    numbers = [2 if name == "neutral" else ["good", "bad"].index(name) for name in NAMED]
    for setting in places(kind):
        task = make_task_of(classes=order, **setting)
        found = labels_by_text(task) | labels_by_text(task, "validation")
        assert found == expected_labels(task, numbers)
        assert task.assets["classes"] == order


def test_numbers_are_taken_as_they_are_whatever_the_checkpoint_calls_them(places, make_task_of):
    for setting in places("numbered"):
        task = make_task_of(classes=["x", "y", "z"], **setting)
        found = labels_by_text(task) | labels_by_text(task, "validation")
        assert found == expected_labels(task, NUMBERS)
        assert task.assets["classes"] == ["x", "y", "z"]


def test_names_that_differ_by_case_alone_are_kept_apart(make_task_of, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:4], ["a", "A", "a", "A"])
    task = make_task_of(2, files=path, validation_fraction=0.0)
    assert labels_by_text(task) == expected_labels(task, [1, 0, 1, 0], TEXTS[:4])


def test_one_row_a_document_and_a_batch_as_foretold(places, make_task_of, labelled_config):
    task = make_task_of(**places("named")[0])
    total = sum(len(task.source(split)) for split in ("train", "validation"))
    assert total == len(TEXTS)
    config = labelled_config()
    with config.unlocked():
        config.train = default_config("bert").train
    (batch,) = take(train_iterator(task, batch_size=config.train.batch_size, seed=0), 1)
    specs = batch_specs(config)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == specs
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_long_texts_are_cut_and_short_ones_padded(make_task_of, tmp_path):
    texts = [" ".join(f"the {n} fox" for n in range(120_000)), "a fox", "the " * 400]
    path = write_jsonl(tmp_path / "a.jsonl", texts, [2, 1, 0])
    task = make_task_of(files=path, validation_fraction=0.0)
    assert labels_by_text(task) == expected_labels(task, [2, 1, 0], texts)
    assert len(task.source("train")) == 3


def test_fillers_are_rows_of_tokens_of_class_0(places, make_task_of):
    task = make_task_of(**places("numbered")[0])
    count = len(task.source("validation"))
    size = next(size for size in range(3, 9) if count % size)
    examples = joined(list(eval_batches(task, batch_size=size)))
    filler = examples["example_weight"] == 0
    assert filler.any()
    assert (examples["labels"][filler] == 0).all()
    assert (examples["attention_mask"][filler] == 1).all()


def test_classes_belong_to_what_tells_data_from_others(make_task_of, tmp_path):
    one, two = (write_jsonl(tmp_path / f"{n}.jsonl", TEXTS, NUMBERS) for n in "ab")
    other = write_jsonl(tmp_path / "c.jsonl", TEXTS, [*NUMBERS[:-1], (NUMBERS[-1] + 1) % 3])
    first, same, changed = (
        make_task_of(files=path, validation_fraction=0.0) for path in (one, two, other)
    )
    assert difference(first.fingerprint, same.fingerprint, first.unit) is None
    assert difference(first.fingerprint, changed.fingerprint, first.unit)


def test_a_run_continues_exactly(places, make_task_of):
    setting = places("named")[0]
    task = make_task_of(**setting)
    batches = train_iterator(task, batch_size=4, seed=3)
    take(batches, 30)
    state, expected = batches.get_state(), take(batches, 6)
    assert_continues(task, state, expected, make_task_of(classes=task.assets["classes"], **setting))


def test_other_classes_do_not_find_the_rows_of_before(places, make_task_of):
    (setting,) = [one for one in places("named") if str(one.get("files")).endswith("jsonl")]
    first, second = (make_task_of(classes=order, **setting) for order in (NAMES, NAMES[::-1]))
    for split in ("train", "validation"):
        before, after = labels_by_text(first, split), labels_by_text(second, split)
        assert after == {text: 2 - label for text, label in before.items()}


def test_validation_alone_needs_no_training_text(make_task_of, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, NUMBERS)
    task = make_task_of(validation_files=path)
    assert labels_by_text(task, "validation") == expected_labels(task, NUMBERS)
    expect_error(lambda: task.source("train"), "found the embedded corpus, which has none; set")


def test_without_the_key_or_the_classifier_no_class_is_asked_for(
    labelled_config, tokenizer, tmp_path
):
    files = write_jsonl(tmp_path / "a.jsonl", TEXTS, [None] * len(TEXTS))
    assets = {"tokenizer": json.loads(tokenizer.to_json())}
    for head, key in (("classifier", None), ("none", "label"), ("masked_lm", "label")):
        config = with_head(labelled_config(files=files, label_key=key), head, 3)
        (batch,) = take(train_iterator(make_task(config, assets), batch_size=4, seed=0), 1)
        assert ("labels" in batch) == (head == "masked_lm")
    assert len(list(iter_documents(config.data, "train"))) > 50
