"""Several real processes train, stop, resume and evaluate as one would."""

import json
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from quantizable_flax.checkpoint import store
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.tasks import make_task
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.training.loop import train
from tests.tiny import flags, tiny_config
from tests.training.hosts import Hosts, arrays, free_port
from tests.training.test_resume import assert_bitwise_equal

RECIPE = "--config=configs/quickstart.py"
# 6 does not divide the validation split, and 4 hosts do not divide 6.
CHANGES: dict[str, Any] = {
    "model__hidden_dropout": 0.1,
    "model__attention_dropout": 0.1,
    "train__steps": 20,
    "train__log_every": 1,
    "train__eval_every": 10,
    "train__eval_batches": 0,
    # Adam blows up the rounding of gradients that are 0 but for it; more epsilon does not.
    "optimizer__eps": 1e-4,
    "eval__batch_size": 6,
    "checkpoint__every": 10,
}
MESHES = {2: {"mesh__fsdp": 2}, 4: {"mesh__fsdp": 2, "mesh__tensor": 2}}


def start(folder, workdir, count: int, **changes) -> Hosts:
    options = {**CHANGES, **MESHES[count], **changes}
    out = workdir.parent / f"{workdir.name}-output"
    return Hosts(out, count, "train.py", RECIPE, f"--workdir={workdir}", *flags(folder, **options))


def curve(workdir, group: str, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["group"] == group]
    assert len({row["step"] for row in rows}) == len(rows)  # one process alone has written
    return {row["step"]: row[name] for row in rows}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder with the text, workdir of the run of one process)."""
    folder = tmp_path_factory.mktemp("hosts")
    train(tiny_config(folder, **CHANGES), str(folder / "run"))
    return folder, folder / "run"


@pytest.fixture(scope="module")
def two(alone):
    """Workdir of the same run on two hosts, which split every parameter between them."""
    folder, _ = alone
    ended = start(folder, folder / "two", 2).succeed()
    assert "step 20/20" in ended[0].stderr
    assert "step" not in ended[1].stderr
    return folder / "two"


def assert_same_run(workdir, alone, steps=range(1, 21)) -> None:
    losses, expected = (curve(path, "train", "loss") for path in (workdir, alone))
    assert losses == pytest.approx({step: expected[step] for step in steps}, rel=1e-5)


def assert_validation_is_exact(workdir) -> None:
    """What the run has logged is what one process finds for its parameters."""
    run = load_run(str(workdir))
    evaluator = Evaluator(run, make_task(run.config, run.assets))
    assert curve(workdir, "validation", "perplexity")[20] == pytest.approx(
        evaluator.fp.value, rel=1e-6
    )


def test_global_batches_do_not_depend_on_the_hosts(alone, tmp_path):
    folder, _ = alone
    meshes = ["4-1-1", "1-2-2", "1-1-4", "2-1-2"]
    Hosts(
        tmp_path,
        2,
        "-m",
        "tests.training.host_batches",
        f"--text={folder}",
        f"--out={tmp_path}",
        f"--meshes={','.join(meshes)}",
        devices=2,
        joining="slurm",
    ).succeed()
    data = train_iterator(make_task(tiny_config(folder)), batch_size=8, seed=0)
    whole = {f"{k}/{i}": x for i in range(3) for k, x in next(data).items()}
    data.close()
    for mesh in meshes:
        with np.load(tmp_path / f"{mesh}.npz") as found:
            assert set(found.files) == set(whole)
            for key, x in whole.items():
                np.testing.assert_array_equal(found[key], x)


def test_two_hosts_train_as_one(alone, two):
    _, run = alone
    assert_same_run(two, run)
    assert_validation_is_exact(two)
    assert_validation_is_exact(run)
    assert (two / "config.json").exists()
    assert (two / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


def interrupted(workdir, copy) -> None:
    """A copy of a run as it was at step 10."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "20")
    (copy / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_two_hosts_are_continued_by_any_number(alone, two, tmp_path, count):
    folder, run = alone
    interrupted(two, tmp_path / "run")
    if count == 1:
        train(tiny_config(folder, **CHANGES), str(tmp_path / "run"))
    else:
        start(folder, tmp_path / "run", count).succeed()
    assert_same_run(tmp_path / "run", run, range(11, 21))
    assert_validation_is_exact(tmp_path / "run")
    if count == 2:
        assert_bitwise_equal(arrays(tmp_path / "run", 20), arrays(two, 20))


@pytest.mark.parametrize(
    ("number", "target"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_process_stops_all_at_the_same_saved_step(alone, tmp_path, number, target):
    folder, _ = alone
    hosts = start(folder, tmp_path / "run", 2, train__steps=1_000_000, optimizer__decay_steps=20)
    hosts.wait_for(tmp_path / "run" / "checkpoints" / "10")
    hosts.processes[target].send_signal(number)
    ended = hosts.wait()
    expected = [0, 0]
    if number == signal.SIGINT:
        expected[target] = 130
    assert [one.status for one in ended] == expected, ended[0].stderr + ended[1].stderr
    newest = store.saved_steps(epath.Path(tmp_path / "run"))[0]
    assert f"step {newest} is saved" in ended[0].stderr
    notes = store.read_notes(epath.Path(tmp_path / "run"), newest)
    assert notes.data["next_index"] == notes.info["step"] == newest
    opt_state = jax.tree.leaves_with_path(arrays(tmp_path / "run", newest)["opt_state"])
    counts = {int(x) for path, x in opt_state if "count" in jax.tree_util.keystr(path)}
    assert counts == {newest}


@pytest.mark.slow
def test_a_step_that_one_host_cannot_read_is_damaged_for_all(alone, two, tmp_path):
    folder, run = alone
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    ended = Hosts(
        tmp_path,
        2,
        "-m",
        "tests.training.host_damage",
        f"--text={folder}",
        f"--workdir={tmp_path / 'run'}",
    ).succeed()
    assert "process 1 could not read it" in ended[0].stderr
    assert "falling back to step 10" in ended[0].stderr
    assert (tmp_path / "run" / "damaged" / "20").is_dir()
    assert_same_run(tmp_path / "run", run, range(11, 21))


def test_hosts_with_other_data_are_refused(alone, tmp_path):
    folder, _ = alone

    def each(index: int) -> list[str]:
        return [f"--config.data.seq_len={16 - index}"]

    out, workdir = tmp_path / "out", tmp_path / "run"
    hosts = Hosts(out, 2, "train.py", RECIPE, f"--workdir={workdir}", *flags(folder), each=each)
    for one in hosts.wait():
        assert one.status == 2, one.stderr
        assert (
            "the training data to be the same on every host, found others on process 1"
            in (one.stderr.splitlines()[-1])
        )
        assert "Traceback" not in one.stderr
    assert not workdir.exists()


def test_hosts_evaluate_as_one(two, tmp_path):
    rows = tmp_path / "rows.json"
    ended = Hosts(
        tmp_path, 2, "eval.py", f"--workdir={two}", "--quant=none", f"--json={rows}", devices=2
    ).succeed()
    (row,) = json.loads(rows.read_text())
    run = load_run(str(two))
    alone = Evaluator(run, make_task(run.config, run.assets)).fp
    assert row["fp"] == pytest.approx(alone.value, rel=1e-6)
    assert row["max_inf_norm"] == pytest.approx(alone.outliers["max_inf_norm"], rel=1e-5)
    assert row["avg_kurtosis"] == pytest.approx(alone.outliers["avg_kurtosis"], rel=1e-5)
    assert "vanilla" in ended[0].stdout
    assert "vanilla" not in ended[1].stdout


def test_processes_that_never_come_are_one_sentence(tmp_path):
    command = ["train.py", RECIPE, f"--workdir={tmp_path / 'run'}", "--coordinator_timeout=2"]
    command += [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=3"]
    # One waits for others, the other one looks for the first on a port where nobody listens.
    for index, place in ((0, "first"), (1, "lost")):
        (one,) = Hosts(tmp_path / place, 1, *command, f"--process_id={index}", joining="not").wait(
            60
        )
        assert one.status == 2, one.stderr
        assert one.stderr.startswith("error: the 3 processes at 127.0.0.1:")
        assert "did not all answer within 2 s" in one.stderr
        assert len(one.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
