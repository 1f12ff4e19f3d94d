"""What becomes of images that cannot be decoded, in training and in evaluation."""

import logging
from itertools import islice

import numpy as np
import pytest

from quantizable_flax.checkpoint import resume
from quantizable_flax.config import default_config
from quantizable_flax.data.images import stand_ins
from quantizable_flax.data.images.task import ImageTask
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.errors import UserError
from tests.data.images.conftest import (
    AUGMENT,
    elements,
    encode,
    expect_error,
    make_config,
    pngs,
    random_image,
    write_folder,
)

FILES = pngs()  # 12 images
BAD = "dog/3.png"
BAD_PIXELS = random_image(2003).tobytes()  # as `pngs` draws them
BROKEN = {
    "cut": FILES[BAD][:60],
    "empty": b"",
    "text": b"<html>404</html>",
}
EPOCH = 3  # batches of 4


def open_task(folder, files=None, **settings):
    path = write_folder(folder, files) if files else str(folder)
    settings = {"validation_fraction": 0.0, **settings}
    return ImageTask(make_config(files=path, **settings))


def batches(task, count=3 * EPOCH, state=None):
    iterator = train_iterator(task, batch_size=4, seed=5)
    if state:
        iterator.set_state(state)
    found = list(islice(iterator, count))
    return found, iterator.get_state()


def rows(found):
    return [
        (image.tobytes(), int(label))
        for batch in found
        for image, label in zip(batch["images"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("augment", [{}, AUGMENT])
def test_a_skipped_image_gives_its_place_to_the_next_and_changes_no_other(tmp_path, kind, augment):
    whole = open_task(tmp_path / "whole", FILES, **augment)
    task = open_task(tmp_path / "data", FILES | {BAD: BROKEN[kind]}, on_corrupt="skip", **augment)
    expected, found = rows(batches(whole)[0]), rows(batches(task)[0])
    differing = [place for place, row in enumerate(expected) if row != found[place]]
    assert len(differing) == 3  # once an epoch
    if not augment:
        source = whole.source("train")
        names = [raw["name"].split("whole/")[1] for raw in elements(source)]
        following = source[(names.index(BAD) + 1) % len(names)]
        for place in differing:
            image, label = found[place]
            pixels = np.frombuffer(image, np.uint8).reshape(12, 12, 3)
            assert (encode(pixels), label) == (following["image"], following["label"])


def test_a_run_with_skipped_images_continues_exactly(tmp_path):
    task = open_task(
        tmp_path / "data", FILES | {BAD: b"", "cat/1.png": b"x"}, on_corrupt="skip", **AUGMENT
    )
    expected = rows(batches(task)[0])
    _, state = batches(task, 4)
    again = open_task(tmp_path / "data", on_corrupt="skip", **AUGMENT)
    assert rows(batches(again, 5, state)[0]) == expected[16:]


def test_the_advice_lets_a_run_that_has_begun_go_on(tmp_path):
    """Replacing the image keeps the order of the others, and so does skipping it."""
    expected = rows(batches(open_task(tmp_path / "whole", FILES))[0])
    task = open_task(tmp_path / "data", FILES | {BAD: BROKEN["cut"]})
    _, state = batches(task, 1)
    error = expect_error(
        lambda: batches(task, 2 * EPOCH, state), "whole image in .*dog/3.png, found it truncated"
    )
    assert "replace it" in str(error)
    assert "data.on_corrupt='skip'" in str(error)
    other = encode(random_image(77))
    for settings, content in (({"on_corrupt": "skip"}, None), ({}, other)):
        if content:
            (tmp_path / "data" / BAD).write_bytes(content)
        mended = open_task(tmp_path / "data", **settings)
        found = rows(batches(mended, 2 * EPOCH, state)[0])
        same = [one == two for one, two in zip(found, expected[4:28], strict=True)]
        assert same == [image != BAD_PIXELS for image, _ in expected[4:28]]
        assert not all(same)


def test_each_is_named_once(tmp_path, caplog):
    task = open_task(tmp_path / "data", FILES | {BAD: b"", "cat/1.png": b"x"}, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        batches(task)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for name in (BAD, "cat/1.png"):
        assert sum(name in message for message in messages) == 1


def test_evaluation_counts_every_image_and_so_refuses(tmp_path):
    files = FILES | {name.replace("/", "/more"): content for name, content in FILES.items()}
    plain = open_task(tmp_path / "plain", files, validation_fraction=0.5)
    held_out = plain.source("validation")[1]["name"].split("plain/")[1]
    task = open_task(
        tmp_path / "data", files | {held_out: b""}, validation_fraction=0.5, on_corrupt="skip"
    )
    error = expect_error(
        lambda: list(eval_batches(task, batch_size=4)), f"{held_out}, found an empty file"
    )
    # Without it the training images stay as they are.
    assert "replace or remove it" in str(error)
    (tmp_path / "data" / held_out).unlink()
    mended = open_task(tmp_path / "data", validation_fraction=0.5)
    list(eval_batches(mended, batch_size=4))
    names = [
        [raw["name"].rsplit("/", 2)[1:] for raw in elements(each.source("train"))]
        for each in (plain, mended)
    ]
    assert names[0] == names[1]


def test_calibration_on_training_images_skips_too(tmp_path):
    task = open_task(tmp_path / "data", FILES | {BAD: b""}, on_corrupt="skip")
    found = list(eval_batches(task, split="train", batch_size=4, seed=1, full=True))
    whole = open_task(tmp_path / "whole", FILES)
    expected = list(eval_batches(whole, split="train", batch_size=4, seed=1, full=True))
    left, calibrating = ({image for image, _ in rows(each)} for each in (expected, found))
    assert left - calibrating == {BAD_PIXELS}


def test_nothing_but_broken_images_is_an_error(tmp_path):
    task = open_task(tmp_path / "data", dict.fromkeys(FILES, b""), on_corrupt="skip")
    expect_error(
        lambda: batches(task, 1),
        f"found {stand_ins.MOST_IN_A_ROW} in a row that cannot.*fetch the data again",
    )


def test_hosts_see_the_same_elements_as_text(tmp_path):
    tasks = [open_task(tmp_path / "data", FILES if first else None) for first in (True, False)]
    texts = [[str(raw) for raw in elements(task.source("train"))] for task in tasks]
    assert texts[0] == texts[1]


def test_other_words_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.on_corrupt must be one of error, skip"):
        open_task(tmp_path / "data", FILES, on_corrupt="ignore")


def test_a_run_from_before_continues_and_may_skip(tmp_path):
    saved, asked = default_config("vit").to_dict(), default_config("vit").to_dict()
    del saved["data"]["on_corrupt"]
    resume.check_same(saved, asked, tmp_path)
    asked["data"]["on_corrupt"] = "skip"
    resume.check_same(saved, asked, tmp_path)
