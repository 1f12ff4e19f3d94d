"""OPT and ViT through the loop: they learn, and resume bitwise with augmentation on."""

import json
import signal

import numpy as np
import pytest
from etils import epath
from PIL import Image

from quantizable_flax.checkpoint import store
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.errors import UserError
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config, write_text
from tests.training.test_resume import assert_bitwise_equal, saved, start, wait_for

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
# Mixup, CutMix and every augmentation are on in the tiny ViT.
FAMILIES = ("opt", "vit")
RECIPES = {"opt": "configs/opt_tiny.py", "vit": "configs/vit_digits.py"}


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, tmp_path_factory):
    """(family, folder with the text, workdir of an uninterrupted run of 80 steps)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(
        folder, request.param, **DROPOUT, train__eval_every=40, train__telemetry_every=40
    )
    train(config, str(folder / "run"))
    return request.param, folder, folder / "run"


def lines(workdir, group: str) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["group"] == group]


def test_the_model_brings_its_metric_and_items(finished):
    family, _, workdir = finished
    metric, unit = {"opt": ("perplexity", "sequences"), "vit": ("top1", "images")}[family]
    validation, training = lines(workdir, "validation"), lines(workdir, "train")
    assert validation[-1]["loss"] < validation[0]["loss"]
    value = validation[-1][metric]
    if family == "opt":
        assert value == pytest.approx(np.exp(validation[-1]["loss"]))
        assert training[0]["labels"] == 8 * 15  # the first token has nothing before it
    else:
        assert value == pytest.approx(100 * validation[-1]["accuracy"])
        assert training[0]["labels"] == 8
    assert all(row[f"{unit}_per_second"] > 0 for row in training)
    assert all(0 <= row["input_share"] <= 1 for row in training)
    assert lines(workdir, "telemetry")[0]["layer_0/ffn_residual:inf_norm"] > 0


def test_learning_rate_is_logged(finished):
    family, _, workdir = finished
    rates = {row["step"]: row["learning_rate"] for row in lines(workdir, "train")}
    # The warm-up ends at step 10; 70 steps of decay follow, and step 80 is the one numbered 79.
    share = (79 - 10) / 70
    expected = 1 - share if family == "opt" else (1 + np.cos(np.pi * share)) / 2
    assert rates[80] == pytest.approx(3e-3 * expected, rel=1e-4)


def test_interrupted_run_is_bitwise_the_whole_one(finished, tmp_path):
    family, folder, whole = finished
    # Images by worker processes, unlike the whole run; text needs none, and tests/data compares.
    workers = 2 if family == "vit" else 0
    changes = {**DROPOUT, "optimizer__decay_steps": 80, "data__workers": workers}
    train(tiny_config(folder, family, **changes, train__steps=40), str(tmp_path))
    train(tiny_config(folder, family, **changes), str(tmp_path))
    assert_bitwise_equal(saved(tmp_path, 80), saved(whole, 80))


@pytest.mark.slow
def test_killed_run_is_bitwise_the_whole_one(finished, tmp_path):
    family, folder, whole = finished
    changes = {**DROPOUT, "optimizer__decay_steps": 80}
    process = start(
        folder,
        tmp_path / "run",
        recipe=RECIPES[family],
        family=family,
        **changes,
        train__steps=1000000,
        checkpoint__keep=100000,
    )
    wait_for(tmp_path / "run" / "checkpoints" / "40", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for step in store.saved_steps(epath.Path(tmp_path / "run")):
        if step > 40:
            epath.Path(tmp_path / "run" / "checkpoints" / str(step)).rmtree()
    train(tiny_config(folder, family, **changes), str(tmp_path / "run"))
    assert_bitwise_equal(saved(tmp_path / "run", 80), saved(whole, 80))


def test_checkpoint_keeps_what_the_data_side_needs(finished):
    family, _, workdir = finished
    run = load_run(str(workdir))
    asset = {"opt": "tokenizer", "vit": "classes"}[family]
    assert list(run.assets) == [asset]
    assert json.loads((workdir / f"{asset}.json").read_text()) == run.assets[asset]
    assert run.config.model.name == family
    if family == "vit":
        assert run.assets["classes"] == list("0123456789")


def test_augmentation_of_a_run_is_fixed(finished):
    family, folder, workdir = finished
    if family == "opt":
        change, sentence = {"data__seq_len": 8}, "data.seq_len=16, not 8"
    else:
        change, sentence = {"data__augment__flip": False}, "data.augment.flip=true, not false"
    with pytest.raises(UserError, match=sentence):
        train(tiny_config(folder, family, **DROPOUT, **change), str(workdir))


def test_family_cannot_be_switched_by_name(tmp_path):
    with pytest.raises(UserError, match=r"model\.name cannot be changed to 'vit'"):
        train(tiny_config(tmp_path, "opt", model__name="vit"), str(tmp_path / "run"))


def write_images(root, count: int = 12) -> None:
    """Two classes of small images under root/class/."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")


IMAGES = {"model__num_classes": 2, "data__validation_fraction": 0.2, "train__steps": 4}


def test_corrupt_image_names_its_file_and_loses_nothing(tmp_path):
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path, "vit", **IMAGES, data__files=str(tmp_path / "images"))
    train(config, str(tmp_path / "run"))
    for i in range(12):
        (tmp_path / "images" / "dog" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with config.unlocked():
        config.train.steps = 40
    with pytest.raises(UserError, match=r"dog.\d+\.png"):
        train(config, str(tmp_path / "run"))
    assert store.saved_steps(epath.Path(tmp_path / "run")) == [4]


def test_class_folder_without_images_and_wrong_count(tmp_path):
    write_images(tmp_path / "images")
    files = {"data__files": str(tmp_path / "images")}
    with pytest.raises(UserError, match=r"found 2 classes, model\.num_classes is 10"):
        train(tiny_config(tmp_path, "vit", **files), str(tmp_path / "run"))
    (tmp_path / "images" / "emu").mkdir()
    with pytest.raises(UserError, match="emu"):
        train(tiny_config(tmp_path, "vit", **IMAGES, **files), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_classes_than_the_checkpoint_are_refused(tmp_path):
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path, "vit", **IMAGES, data__files=str(tmp_path / "images"))
    train(config, str(tmp_path / "run"))
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "fox")
    with config.unlocked():
        config.train.steps = 8
    with pytest.raises(UserError, match="classes of the checkpoint"):
        train(config, str(tmp_path / "run"))


def test_vit_learns_the_digits(tmp_path):
    off = {"crop_scale": 1.0, "pad_crop": 0, "flip": False, "rand_layers": 0, "color_jitter": 0.0}
    config = tiny_config(
        tmp_path,
        "vit",
        **{f"data__augment__{key}": value for key, value in off.items()},
        data__validation_fraction=0.2,
        model__mixup_alpha=0.0,
        model__cutmix_alpha=0.0,
        model__patch_size=2,
        model__hidden_size=32,
        model__initializer_range=0.05,
        optimizer__learning_rate=5e-3,
        optimizer__warmup_steps=40,
        train__steps=400,
        train__eval_every=400,
        train__eval_batches=0,
        train__batch_size=32,
        checkpoint__every=400,
    )
    train(config, str(tmp_path / "run"))
    # Ten classes: chance is 10 %; measured 92.7 %.
    assert lines(tmp_path / "run", "validation")[-1]["top1"] > 80


def test_more_data_than_the_run_began_with_is_refused(tmp_path):
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path, "vit", **IMAGES, data__files=str(tmp_path / "images"))
    train(config, str(tmp_path / "run"))
    for i in range(8):
        Image.new("L", (8, 8), i).save(tmp_path / "images" / "dog" / f"new{i}.png")
    with config.unlocked():
        config.train.steps = 8
    with pytest.raises(UserError, match=r"a run on \d+ images where the data now have \d+"):
        train(config, str(tmp_path / "run"))


def test_validation_files_may_change_but_not_appear(finished, tmp_path):
    family, folder, workdir = finished
    other = folder / "other"
    if family == "opt":
        write_text(folder / "other.txt", seed=9)
        other = folder / "other.txt"
    with pytest.raises(UserError, match=r"data.validation_files=null, not"):
        train(
            tiny_config(folder, family, **DROPOUT, data__validation_files=str(other)), str(workdir)
        )


def test_checkpoint_of_an_older_version_keeps_its_tokenizer(tmp_path):
    train(tiny_config(tmp_path, "opt", train__steps=4), str(tmp_path / "run"))
    step = tmp_path / "run" / "checkpoints" / "4"
    tokenizer = load_run(str(tmp_path / "run")).assets["tokenizer"]
    # Before there were other assets, the tokenizer was an item of its own.
    (step / "assets").rename(step / "tokenizer")
    (step / "tokenizer" / "metadata").write_text(json.dumps(tokenizer))
    assert load_run(str(tmp_path / "run")).assets == {"tokenizer": tokenizer}
