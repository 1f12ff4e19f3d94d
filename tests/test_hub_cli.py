"""Training from the command line on a dataset of the Hugging Face hub."""

import json
import shutil

import datasets

from tests.programs import assert_mistake, run
from tests.tiny import flags, write_text
from tests.training.test_resume import assert_bitwise_equal, saved

CLIPPED = "--config=configs/quickstart.py:clipped"


def arguments(folder, workdir, **data):
    """Few steps on the data that are named, with two checkpoints."""
    short = {"train__steps": 20, "checkpoint__every": 10, "optimizer__warmup_steps": 4}
    shared = [f for f in flags(folder, **short) if not f.startswith("--config.data.files")]
    named = [f"--config.data.{key}={value}" for key, value in data.items()]
    return [CLIPPED, f"--workdir={workdir}", *shared, *named]


def train(folder, workdir, **data):
    done = run("train.py", *arguments(folder, workdir, **data))
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stderr
    return done


def test_a_run_on_a_saved_dataset_is_that_on_its_json_lines_and_continues_where_it_moved(tmp_path):
    write_text(tmp_path / "text.txt")
    texts = (tmp_path / "text.txt").read_text().split("\n\n")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "data")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    train(tmp_path, tmp_path / "run", source=f"hf:{tmp_path / 'data'}")
    train(tmp_path, tmp_path / "lines", files=tmp_path / "text.jsonl")
    assert_bitwise_equal(saved(tmp_path / "run", 20), saved(tmp_path / "lines", 20))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "20")  # as though it had been killed
    shutil.move(tmp_path / "data", tmp_path / "moved")
    done = train(tmp_path, tmp_path / "again", source=f"hf:{tmp_path / 'moved'}")
    assert "step 10" in done.stderr
    assert_bitwise_equal(saved(tmp_path / "run", 20), saved(tmp_path / "again", 20))
    datasets.Dataset.from_dict({"text": texts[::-1]}).save_to_disk(tmp_path / "others")
    others = arguments(tmp_path, tmp_path / "again", source=f"hf:{tmp_path / 'others'}")
    assert_mistake(run("train.py", *others), "or another order of them", "new --workdir")


def test_mistakes(tmp_path):
    write_text(tmp_path / "text.txt")
    for source, part in (
        ("hf:someone/something", "correct the name, or fetch it where there is a network"),
        ("hf:./nothing_here", "in the folder ./nothing_here of data.source, found nothing there"),
        ("hf:", "hf:NAME[,CONFIG], found 'hf:'"),
    ):
        done = run("train.py", *arguments(tmp_path, tmp_path / "run", source=source))
        assert_mistake(done, part)
    assert not (tmp_path / "run").exists()
