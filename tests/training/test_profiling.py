"""Traces of chosen steps appear, and change nothing."""

import gzip
import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from quantizable_flax.errors import UserError
from quantizable_flax.runtime.profiling import ON_SIGNAL, Profile, parse_steps
from quantizable_flax.runtime.progress import Clock
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config


def traces(workdir) -> dict[str, set[int]]:
    """The trace folders of a run, with the steps that each names."""
    found = {}
    for folder in (workdir / "profile" / "plugins" / "profile").glob("*"):
        assert list(folder.glob("*.xplane.pb"))
        (file,) = folder.glob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps = {
            int(event["args"]["step_num"])
            for event in events
            if event.get("name") == "train" and "step_num" in event.get("args", {})
        }
        found[folder.name] = steps
    return found


def losses(workdir) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["group"] == "train"]


def test_traced_run_learns_the_same(tmp_path, capfd):
    config = tiny_config(tmp_path, train__steps=12, train__log_every=1)
    train(config, str(tmp_path / "plain"))
    train(config, str(tmp_path / "traced"), profile="4:6")
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    assert traces(tmp_path / "traced") == {"steps_4_6": {4, 5, 6}}
    assert not traces(tmp_path / "plain")
    assert "steps 4 to 6 are traced" in capfd.readouterr().err


def test_trace_ends_with_the_run_and_is_not_made_behind_it(tmp_path):
    for done in (0, 9):  # a new run, and one continued behind the steps asked for
        profile = Profile(epath.Path(tmp_path / str(done)), (3, 9), Clock(), lambda text: None)
        step = profile.around(jax.jit(lambda state, batch: state + batch), done)
        for _ in range(3):
            step(jnp.float32(0), jnp.float32(1))
        profile.close()
    assert traces(tmp_path / "0") == {"steps_3_3": {3}}
    assert not traces(tmp_path / "9")


def test_processes_of_one_host_write_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        profile = Profile(epath.Path(tmp_path), (1, 1), Clock(), lambda text: None)
        profile.around(lambda state, batch: state, done=0)(jnp.float32(0), None)
        profile.close()
    files = (tmp_path / "profile" / "plugins" / "profile" / "steps_1_1").glob("*.xplane.pb")
    assert {file.name[: len("process_0_")] for file in files} == {"process_0_", "process_1_"}


def test_signal_traces_the_next_steps(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    notes: list[str] = []
    profile = Profile(epath.Path(tmp_path), None, Clock(), notes.append)
    step = profile.around(jax.jit(lambda state, batch: state + batch), done=20)
    state = jnp.float32(0)
    for number in range(21, 40):
        if number == 23:
            os.kill(os.getpid(), signal.SIGUSR1)
        state = step(state, jnp.float32(1))
    profile.close()
    last = 23 + ON_SIGNAL - 1
    assert traces(tmp_path) == {f"steps_23_{last}": set(range(23, last + 1))}
    assert float(state) == 19
    assert len(notes) == 1
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("text", ["10", "5:4", "0:3", "a:b", "3:4:5", "101:102", ""])
def test_other_spans_are_refused(text):
    with pytest.raises(UserError, match="--profile must be START:STOP"):
        parse_steps(text, last=100)


def test_span():
    assert parse_steps("10:12", last=100) == (10, 12)
    assert parse_steps(None, last=100) is None
