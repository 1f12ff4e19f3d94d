"""Worker processes change nothing but the speed, and end with what started them."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.share import WHOLE, Share
from quantizable_flax.data.task import Task
from quantizable_flax.data.workers import claim_shared_memory
from quantizable_flax.errors import UserError

from .batches import assert_same, take

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal
from quantizable_flax.data.pipeline import train_iterator
from tests.data.test_workers import Numbers
if __name__ == "__main__":
    batches = train_iterator(Numbers(), batch_size=4, seed=0, workers=2)
    next(batches)
    signal.signal(signal.SIGINT, lambda *_: print("asked to stop", flush=True))
    os.killpg(os.getpgid(0), signal.SIGINT)
    print(sum(int(next(batches)["y"].sum()) for _ in range(29)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Numbers(Task):
    """Large enough for shared memory; one number fails where it is asked to."""

    unit = "numbers"
    assets = {}  # noqa: RUF012

    def __init__(self, broken=None):
        self._broken = broken

    def source(self, split):
        return range(40)

    def transform(self, *, train):
        return self._example

    def _example(self, number):
        if number == self._broken:
            raise UserError(f"found the broken number {number}; take another")
        return {"x": np.full((64, 64), number), "y": np.int32(number)}


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("workers", "family", "share"), [(1, "bert", WHOLE), (2, "opt", Share((1,), 2))]
)
def test_training_batches_and_restarts_are_the_same(
    text_config, make_text_task, workers, family, share
):
    task = make_text_task(text_config(family))
    options = {"batch_size": 12, "seed": 5, "share": share}
    alone = train_iterator(task, **options)
    take(alone, 4)
    batches = train_iterator(task, workers=workers, **options)
    batches.set_state(alone.get_state())
    found = take(batches, 5)
    assert batches.get_state()["next_index"] == 9
    batches.close()
    assert not multiprocessing.active_children()
    for left, right in zip(found, take(alone, 5), strict=True):
        assert_same(left, right)
    alone.set_state({"next_index": 4})
    assert_same(next(alone), found[0])


def test_evaluation_batches_are_the_same(text_config, make_text_task):
    task = make_text_task(text_config())
    expected = list(eval_batches(task, batch_size=7))
    batches = eval_batches(task, batch_size=7, workers=2)
    found = list(batches)
    assert len(found) == len(batches) == len(expected) > 2
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)


def pids():
    return sorted(process.pid for process in multiprocessing.active_children())


def test_passes_of_an_evaluation_share_their_workers():
    workers = 2
    batches = eval_batches(Numbers(), batch_size=4, workers=workers)
    expected = [batch["y"].tolist() for batch in eval_batches(Numbers(), batch_size=4)]
    first = next(iter(batches))  # and left before both have started
    assert not pids()
    take(batches, 2)
    started = pids()
    assert len(started) == workers
    for taken in (10, 3, 0, 9, 10, 10):
        one_pass = iter(batches)
        found = [batch["y"].tolist() for batch in itertools.islice(one_pass, taken)]
        assert found == expected[:taken]
        del one_pass
    assert pids() == started
    # A pass within another has processes of its own.
    outer = iter(batches)
    assert next(outer)["y"].tolist() == expected[0]
    assert [batch["y"].tolist() for batch in batches] == expected
    assert [batch["y"].tolist() for batch in outer] == expected[1:]
    assert len(pids()) == workers
    batches.close()
    assert not pids()
    # What a worker made is no memory of the worker.
    assert (first["x"][1] == 1).all()
    assert all(array.flags.owndata and array.flags.writeable for array in first.values())


class Sized:
    def __init__(self, size):
        self._size = size

    def nbytes(self):
        return self._size


def test_shared_memory_is_claimed_before_processes_start(tmp_path):
    total = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    found = rf"data.workers=3, found \d+ MB left in {tmp_path}; .*--shm-size=\d+m"
    with pytest.raises(UserError, match=found):
        claim_shared_memory(Sized(total), 3, str(tmp_path))
    claim_shared_memory(Sized(total), 0, str(tmp_path))
    claim_shared_memory(Sized(total), 3, str(tmp_path / "another system's"))


def test_claims_count_together_until_their_batches_are_gone():
    stat = os.statvfs("/dev/shm")
    part = Sized(stat.f_bavail * stat.f_frsize * 6 // 10 // (2 * 8))  # of 2 processes, 8 each
    other = Sized(part.nbytes())
    claim_shared_memory(part, 2)
    with pytest.raises(UserError, match="MB left in /dev/shm"):
        claim_shared_memory(other, 2)
    del part
    claim_shared_memory(other, 2)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(signal.SIGBUS, "--shm-size"), (signal.SIGKILL, "memory runs out")],
)
def test_a_worker_that_dies_is_one_sentence(number, advice):
    batches = train_iterator(Numbers(), batch_size=4, seed=0, workers=1)
    next(batches)
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, number)
    with pytest.raises(UserError, match=advice) as caught:
        take(batches, 20)
    assert "data.workers=1" in str(caught.value)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_reaches_the_caller(workers):
    batches = eval_batches(Numbers(broken=9), batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        list(batches)
    assert str(caught.value) == "found the broken number 9; take another"


def members(group):
    """Returns the processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # It has just ended.
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_workers_live_through_ctrl_c_and_end_with_a_killed_program():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == "asked to stop\n"
    numbers = itertools.islice(train_iterator(Numbers(), batch_size=4, seed=0), 1, 30)
    assert int(process.stdout.readline()) == sum(int(batch["y"].sum()) for batch in numbers)
    assert process.wait(timeout=60) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []
    process.stdout.close()
