"""Of two runs in one workdir the second is refused, and a run that died is not in the way."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from etils import epath

from quantizable_flax.checkpoint.lock import Lock, held
from quantizable_flax.checkpoint.lock_file import FILE, BucketFile, LocalFile
from quantizable_flax.checkpoint.owner import Owner
from quantizable_flax.errors import UserError
from quantizable_flax.training.loop import train
from tests import compiled
from tests.tiny import flags, tiny_config
from tests.training.hosts import Hosts

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from etils import epath
from quantizable_flax.checkpoint.lock import held
with held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
PATIENT = 1000.0  # seconds between heartbeats: a test that waited for one would not end
BEAT = 0.05


@pytest.fixture
def holder(tmp_path):
    """Another process that has `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(**changes) -> Owner:
    """A process of another machine."""
    return dataclasses.replace(Owner.here(), host="elsewhere", boot="other", **changes)


def no_longer_running() -> Owner:
    """A process of this machine whose number another one has now."""
    return dataclasses.replace(Owner.here(), started=1)


def test_second_run_is_refused_until_the_first_one_is_dead(holder, tmp_path):
    who = rf"in use by process {holder.pid} on {os.uname().nodename} since \d{{4}}-"
    with compiled.counted() as programs, pytest.raises(UserError, match=who):
        train(tiny_config(tmp_path), str(tmp_path / "run"))
    assert programs == []
    assert [file.name for file in (tmp_path / "run").iterdir()] == [FILE]
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / FILE).exists()
    with held(epath.Path(tmp_path / "run"), PATIENT):
        assert Owner.parse((tmp_path / "run" / FILE).read_text()).pid == os.getpid()
    assert not (tmp_path / "run" / FILE).exists()


def fail_in(workdir: Path, mine: Path) -> None:
    with held(epath.Path(workdir), PATIENT):
        mine.write_text("")
        raise RuntimeError


def test_run_that_fails_gives_the_workdir_back(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail_in(tmp_path / "a" / "run", tmp_path / "a" / "mine")
    assert [file.name for file in tmp_path.rglob("*")] == ["a", "mine"]


def test_all_processes_of_a_run_are_refused_alike(tmp_path):
    with held(epath.Path(tmp_path / "run")):
        command = ["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
        ended = Hosts(tmp_path / "out", 2, *command, *flags(tmp_path)).wait()
    assert [one.status for one in ended] == [2, 2]
    first, second = (one.stderr.splitlines()[-1] for one in ended)
    assert f"in use by process {os.getpid()} on" in first
    assert first == second


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(BEAT / 5)


@pytest.fixture(params=["bucket", "disk"])
def file(request, tmp_path, bucket):
    """`lock.json` of a workdir that exists."""
    return BucketFile(bucket) if request.param == "bucket" else LocalFile(epath.Path(tmp_path))


def test_heartbeat_changes_the_file_and_not_its_owner(file):
    with held(file.path.parent, BEAT):
        owner, pulse = file.read()
        until(lambda: file.read()[1] not in (pulse, None))
        assert file.read()[0] == owner


def test_run_on_another_machine_goes_on(file):
    ended = threading.Event()

    def go_on() -> None:
        beat = 0
        while not ended.wait(BEAT):
            beat += 1
            file.write(elsewhere(), beat)

    file.path.write_text(elsewhere().to_json(0))
    thread = threading.Thread(target=go_on)
    thread.start()
    with pytest.raises(UserError, match=r"in use by process \d+ on elsewhere since"):
        Lock(file.path.parent, 3.0)  # refused at the first sign, long before nine seconds
    ended.set()
    thread.join()
    with held(file.path.parent, BEAT):  # no sign came
        assert file.read()[0].host != "elsewhere"


def test_workdir_taken_by_one_that_cannot_see_us(file):
    theirs = elsewhere()
    with held(file.path.parent, BEAT) as lock:
        file.path.write_text(theirs.to_json(0))
        with pytest.raises(UserError, match="on elsewhere since"):
            until(lambda: lock.check() is not None)
    assert file.read()[0] == theirs  # not ours to remove


def test_process_of_this_machine_is_asked_where_there_are_no_locks(bucket):
    (bucket / FILE).write_text(no_longer_running().to_json(0))
    with held(bucket, PATIENT), pytest.raises(UserError, match="in use by process"):
        Lock(bucket, BEAT)
    assert not (bucket / FILE).exists()


@pytest.mark.parametrize(
    ("changes", "locked", "runs"),
    [
        ({}, False, True),  # this very process
        ({}, True, False),  # it cannot run, or it would have the lock
        ({"device": 7}, True, True),  # mounted twice: its lock is not ours
        ({"device": 7, "started": 1}, True, False),
        ({"started": 1}, False, False),  # its number is another process's now
        ({"pid": 2**22 + 1}, False, False),  # more than Linux counts
        ({"pid": 2**22 + 1, "namespace": "pid:[1]"}, False, None),  # counted elsewhere
        ({"boot": "before"}, True, False),
        ({"boot": "before"}, False, None),  # another machine may have the same name
        ({"boot": "before", "host": "elsewhere"}, True, None),
    ],
)
def test_which_process_runs(changes, locked, runs):
    here = Owner.here()
    assert dataclasses.replace(here, **changes).still_runs(here, locked) is runs


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"pid": 1}), "\x00" * 9])
def test_half_written_file_names_nobody(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with held(epath.Path(tmp_path), PATIENT):
        assert Owner.parse((tmp_path / FILE).read_text()) is not None
