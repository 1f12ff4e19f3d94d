"""The real command lines: what they print, what they leave, how they fail."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.programs import ROOT, assert_mistake, run
from tests.test_terminal import ASCII
from tests.tiny import flags, write_text

CLIPPED = "--config=configs/quickstart.py:clipped"


def run_with(variables: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    """In a new interpreter, with environment variables of its own."""
    env = os.environ | variables
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a finished clipped run."""
    folder = tmp_path_factory.mktemp("cli")
    relative = os.path.relpath(folder / "run", ROOT)
    done = run("train.py", CLIPPED, f"--workdir={relative}/", *flags(folder))
    assert done.returncode == 0, done.stderr
    assert "step 80/80" in done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_eval_writes_table_json_and_markdown(folder, tmp_path):
    done = run_with(
        ASCII,
        "eval.py",
        f"--workdir={folder / 'run'}",
        f"--workdir={folder / 'run' / 'checkpoints' / '40'}",
        "--quant=w8a8,w4a8",
        "--calibration_seeds=2",
        f"--json={tmp_path / 'out' / 'rows.json'}",
        f"--markdown={tmp_path / 'rows.md'}",
        f"--report={tmp_path / 'report.html'}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert " +- " in done.stdout
    first, second = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert (first["steps"], second["steps"]) == (80, 40)
    assert first["attention"] == "clipped softmax (alpha=0.25)"
    assert first["fp"] < second["fp"]
    assert {"w8a8", "w8a8_std", "w4a8", "max_inf_norm", "avg_kurtosis"} <= first.keys()
    table = (tmp_path / "rows.md").read_text(encoding="utf-8")
    assert table.count("\n") == 4
    assert " ± " in table
    assert "W8A8" in done.stdout
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("<figure>") == report.count("<figcaption>") > 20
    assert "clipped softmax" in report
    for row in (first, second):
        assert f"<h3>{row['name']}: infinity norm of every site</h3>" in report


def test_eval_floating_point_only_on_other_data(folder, tmp_path):
    other = write_text(tmp_path / "other.txt", documents=100, seed=5)
    done = run(
        "eval.py",
        f"--workdir={folder / 'run'}",
        "--quant=none",
        f"--config.data.files={other}",
        f"--json={tmp_path / 'rows.json'}",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert "w8a8" not in row
    assert row["fp"] > 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config=configs/quickstart.py:cliped"], ["'cliped'", "did you mean 'clipped'"]),
        (["--config=configs/nothing.py"], ["could not be loaded", "nothing.py"]),
        ([CLIPPED, "--config.model.hiden_size=3"], ["key model.hiden_size", "'hidden_size'"]),
        ([CLIPPED, "--config.modle.name=x"], ["key modle.name", "'model'"]),
        ([CLIPPED, "--config.train.steps=many"], ["config.train.steps"]),
        ([CLIPPED, "--config.distill.outliers=1.0"], ["which is penalty.weight now"]),
        ([CLIPPED, "--config.model.attention.gate=liner"], ["'liner'", "'linear'"]),
        ([CLIPPED, "--config.model.attention.alpha=-1.0"], ["alpha >= 0", "-1.0"]),
        (
            ["--config=configs/quickstart.py", "--config.model.attention.softmax=clipped"],
            ["needs gamma, alpha or zeta"],
        ),
        ([CLIPPED, "--config.model.attention.alpha=None"], ["needs gamma, alpha or zeta"]),
        ([CLIPPED, "--config.model.name=brt"], ["'brt'", "'bert'"]),
        ([CLIPPED, "--config.data.seq_len=999"], ["data.seq_len", "999"]),
        ([CLIPPED, "--config.data.files=missing.txt"], ["missing.txt"]),
        ([CLIPPED, "--config.mesh.tensor=3"], ["mesh", "tensor=3"]),
        ([CLIPPED, "stray"], ["'stray'"]),
        ([], ["--config is required"]),
    ],
)
def test_train_mistakes(tmp_path, arguments, parts):
    done = run("train.py", *arguments, f"--workdir={tmp_path / 'run'}")
    assert_mistake(done, *parts)
    assert not (tmp_path / "run").exists()


def test_empty_data_file(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    done = run(
        "train.py",
        CLIPPED,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.files={tmp_path / 'empty.txt'}",
    )
    assert_mistake(done, "empty.txt")
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_architecture(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*")}
    arguments = [*flags(folder), "--config.model.hidden_size=32"]
    done = run("train.py", CLIPPED, f"--workdir={folder / 'run'}", *arguments)
    assert_mistake(done, "model.hidden_size=16, not 32", "new --workdir")
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workdir=nowhere"], ["nowhere does not exist"]),
        (["--workdir=train.py"], ["train.py is a file: give a run's workdir"]),
        ([], ["--workdir is required"]),
        (["--workdir=RUN", "--quant=8bit"], ["w8a8", "'8bit'"]),
        (["--workdir=RUN", "--quant=w1a8"], ["2..16", "1"]),
        # Before the evaluation, not after it: a folder is no file.
        (["--workdir=RUN", "--report=RUN"], ["cannot write", "Is a directory"]),
        (["--workdir=RUN", "--report=x", "--markdown=x"], ["must be two files, found x"]),
        (["--workdir=RUN", "--calibration_seeds=0"], ["at least 1"]),
        (["--workdir=RUN", "--config.model.num_layers=3"], ["model.num_layers cannot be changed"]),
        (["--workdir=RUN", "--config.data.fils=x"], ["data.fils", "'files'"]),
        (["--workdir=RUN", "--config.quant.calibration_batches=0"], ["calibration_batches"]),
        (["--workdir=RUN", "--config.quant.weight_estimator=mes"], ["'mes'", "'mse'"]),
        (["--workdir=RUN", "--config.eval.perplexity=tokn"], ["'tokn'", "'token'"]),
    ],
)
def test_eval_mistakes(folder, arguments, parts):
    done = run("eval.py", *(a.replace("RUN", str(folder / "run")) for a in arguments))
    assert_mistake(done, *parts)


def test_eval_of_a_truncated_checkpoint_falls_back_and_leaves_it_alone(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "80" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:50])
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    done = run("eval.py", f"--workdir={tmp_path / 'run'}", "--quant=none")
    assert done.returncode == 0, done.stderr
    assert "step 80" in done.stderr
    assert "falling back to step 40" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
