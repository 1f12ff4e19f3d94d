"""A run that was killed continues as though it had not been."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from quantizable_flax.checkpoint import resume, store
from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError
from quantizable_flax.training import events
from quantizable_flax.training.loop import train
from tests import compiled
from tests.tiny import flags, tiny_config, write_text

ROOT = Path(__file__).parents[2]
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}


def saved(workdir, step: int) -> dict:
    """Everything numeric that a checkpoint holds, read by Orbax alone."""
    with ocp.StandardCheckpointer() as reader:
        arrays = {
            name: reader.restore(Path(workdir) / "checkpoints" / str(step) / name)
            for name in ("params", "opt_state")
        }
    return {**arrays, "data": store.read_notes(epath.Path(workdir), step).data}


def assert_bitwise_equal(left, right):
    left_leaves, right_leaves = jax.tree.leaves(left), jax.tree.leaves(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(left_leaves, right_leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder with the text, workdir of an uninterrupted run of 80 steps)."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(folder, **DROPOUT), str(folder / "run"))
    return folder, folder / "run"


def start(
    folder, workdir, recipe: str = "configs/quickstart.py", family: str = "bert", **changes
) -> subprocess.Popen:
    command = [sys.executable, "train.py", f"--config={recipe}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *flags(folder, family, **changes)], cwd=ROOT, stderr=subprocess.PIPE
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.005)


def test_killed_run_resumes_bitwise(finished, tmp_path):
    folder, whole = finished
    # Far more steps than fit before the kill; the schedule is that of the 80-step run.
    changes = {**DROPOUT, "optimizer__decay_steps": 80}
    process = start(
        folder, tmp_path / "run", **changes, train__steps=1000000, checkpoint__keep=100000
    )
    wait_for(tmp_path / "run" / "checkpoints" / "40", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for step in store.saved_steps(epath.Path(tmp_path / "run")):
        if step > 40:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))

    train(tiny_config(folder, **changes), str(tmp_path / "run"))

    assert_bitwise_equal(saved(tmp_path / "run", 80), saved(whole, 80))
    assert_no_step_twice(tmp_path / "run")


def assert_no_step_twice(workdir: Path) -> None:
    """Neither in the lines nor in the event files of a run that went back."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row["group"]) for row in rows]
    assert [step for step, group in pairs if group == "train"] == [20, 40, 60, 80]
    assert len(pairs) == len(set(pairs))
    read = [events.events(file.read_bytes()) for file in (workdir / "tensorboard").iterdir()]
    tags = [(event.step, v.tag) for file in read for event, _ in file for v in event.summary.value]
    assert sorted(step for step, tag in tags if tag == "train/loss") == [20, 40, 60, 80]
    assert len(tags) == len(set(tags))


def test_forty_steps_then_eighty_is_eighty(finished, tmp_path):
    folder, whole = finished
    train(tiny_config(folder, **DROPOUT, train__steps=40, optimizer__decay_steps=80), str(tmp_path))
    train(tiny_config(folder, **DROPOUT, optimizer__decay_steps=80), str(tmp_path))
    assert_bitwise_equal(saved(tmp_path, 80), saved(whole, 80))


def test_the_generator_of_an_accelerator_goes_on_where_it_was(tmp_path):
    changes = DROPOUT | {"train__dropout_bits": "rbg", "train__steps": 8, "checkpoint__every": 4}
    train(tiny_config(tmp_path, **changes), str(tmp_path / "whole"))
    first = changes | {"train__steps": 4, "optimizer__decay_steps": 8}
    train(tiny_config(tmp_path, **first), str(tmp_path / "parts"))
    train(tiny_config(tmp_path, **changes), str(tmp_path / "parts"))
    assert_bitwise_equal(saved(tmp_path / "parts", 8), saved(tmp_path / "whole", 8))


def test_sigterm_saves_the_step_and_exits_0(finished, tmp_path):
    folder, _ = finished
    process = start(folder, tmp_path / "run", train__steps=1000000)
    wait_for(tmp_path / "run" / "checkpoints" / "40", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr.decode()
    newest = store.saved_steps(epath.Path(tmp_path / "run"))[0]
    assert f"step {newest} is saved" in stderr.decode()


@pytest.mark.parametrize(
    "damage", ["truncated arrays", "truncated config", "missing manifest", "empty assets"]
)
def test_damaged_newest_falls_back_and_is_kept_aside(finished, tmp_path, damage, caplog):
    folder, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "80"
    if damage == "truncated arrays":
        for file in (f for f in (newest / "params").rglob("*") if f.parent.name == "d"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "truncated config":
        file = newest / "config" / "metadata"
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing manifest":
        (newest / "params" / "manifest.ocdbt").unlink()
    else:
        (newest / "assets" / "metadata").write_bytes(b"")

    train(tiny_config(folder, **DROPOUT), str(tmp_path / "run"))

    assert any("step 80" in message and "step 40" in message for message in caplog.messages)
    assert (tmp_path / "run" / "damaged" / "80").is_dir()
    assert_bitwise_equal(saved(tmp_path / "run", 80), saved(whole, 80))
    assert_no_step_twice(tmp_path / "run")


def test_signal_during_validation_is_saved_with_the_next_step(finished, tmp_path, monkeypatch):
    folder, _ = finished

    class Log(io.StringIO):
        def write(self, text):
            if "validation" in text:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Log())
    config = tiny_config(folder, train__eval_every=5, checkpoint__every=1000)
    train(config, str(tmp_path / "run"))
    (step,) = store.saved_steps(epath.Path(tmp_path / "run"))
    assert step in (5, 6)


def test_other_data_is_refused(finished):
    folder, whole = finished
    other = write_text(folder / "other.txt", seed=3)
    refused = pytest.raises(UserError, match=r"on \d+ sequences where the data now have \d+: bring")
    with compiled.counted() as programs, refused:
        train(tiny_config(folder, **DROPOUT, data__files=other), str(whole))
    assert programs == []


def test_a_moved_corpus_goes_on(finished, tmp_path, monkeypatch):
    folder, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "80")
    text = (folder / "text.txt").read_text().split("\n\n")
    (tmp_path / "moved").mkdir()
    for part, documents in enumerate((text[:150], [], text[150:])):
        (tmp_path / "moved" / f"{part}.TXT").write_text("\n\n".join(documents))
    monkeypatch.chdir(tmp_path)
    changes = {**DROPOUT, "data__source": "files", "data__cache_dir": str(tmp_path / "cache")}
    train(tiny_config(folder, **changes, data__files="moved/*.TXT"), "run")
    assert_bitwise_equal(saved(tmp_path / "run", 80), saved(whole, 80))
    swapped = "moved/2.TXT,moved/0.TXT"
    with pytest.raises(UserError, match=r"sequences where the data now have others, or another"):
        train(tiny_config(folder, **changes, data__files=swapped), "run")


def test_a_run_from_before_an_image_could_be_repeated_goes_on_without(tmp_path):
    saved, asked = default_config("vit").to_dict(), default_config("vit")
    del saved["data"]["augment"]["repeats"]
    resume.check_same(saved, asked.to_dict(), tmp_path)
    asked.data.augment.repeats = 3
    with pytest.raises(UserError, match=r"data.augment.repeats=1, not 3"):
        resume.check_same(saved, asked.to_dict(), tmp_path)


@pytest.mark.slow
def test_clipping_may_be_switched_off_in_a_continued_run(finished, tmp_path):
    folder, _ = finished
    train(tiny_config(folder, train__steps=40), str(tmp_path / "run"))
    train(tiny_config(folder, optimizer__clip_norm=0.0), str(tmp_path / "run"))
    assert store.saved_steps(epath.Path(tmp_path / "run"))[0] == 80


def test_all_damaged_is_one_sentence_and_touches_nothing(finished, tmp_path):
    folder, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/config/metadata"):
        file.write_bytes(b"{")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"none of the checkpoints .*steps 80, 40 are damaged"):
        train(tiny_config(folder, **DROPOUT), str(tmp_path / "run"))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_workdir_of_another_architecture_is_refused(finished, tmp_path):
    folder, whole = finished
    config = tiny_config(folder, **DROPOUT, model__hidden_size=32, model__attention__gate="linear")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(UserError, match=r"model.attention.gate=\"none\", not \"linear\""):
        train(config, str(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_asynchronous_save_is_not_overwritten_by_donated_steps(finished, tmp_path):
    # Saving at every step while the next step donates the buffers: every checkpoint must hold the
    # state of its own step, which a run that saves only once tells.
    folder, whole = finished
    changes = {**DROPOUT, "train__steps": 40, "optimizer__decay_steps": 80}
    config = tiny_config(folder, **changes, checkpoint__every=1, checkpoint__keep=100)
    train(config, str(tmp_path))
    assert_bitwise_equal(saved(tmp_path, 40), saved(whole, 40))
