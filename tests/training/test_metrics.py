"""Metric lines on a disk and in a bucket, which has no appending."""

import contextlib
import json
import resource
import sys
import types

import pytest
from etils import epath

from quantizable_flax.runtime.profiling import Profile
from quantizable_flax.runtime.progress import Clock, Progress
from quantizable_flax.training import appended, events
from quantizable_flax.training.appended import UPLOAD_SECONDS, Appended
from quantizable_flax.training.metric_files import MetricWriter, Restart


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(appended, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_bucket_gets_whole_files_once_a_minute_and_at_the_end(bucket, clock):
    path = bucket / "metrics.jsonl"
    first = Appended(path)
    first.write(b"a\n")
    assert not path.exists()
    clock.now += UPLOAD_SECONDS
    first.write(b"b\n")
    assert path.read_text() == "a\nb\n"
    first.write(b"c\n")
    first.close()
    again = Appended(path)  # of the run continued
    again.write(b"d\n")
    again.close()
    assert path.read_text() == "a\nb\nc\nd\n"


def test_disk_gets_each_record_at_once(tmp_path):
    for record in (b"a\n", b"b\n"):
        file = Appended(epath.Path(tmp_path) / "lines")
        file.write(record)
        assert (tmp_path / "lines").read_bytes().endswith(record)
        file.close()
    assert (tmp_path / "lines").read_text() == "a\nb\n"


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """As a full disk does, it takes the part of a record for which there is room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_record_that_does_not_fit_leaves_nothing_and_comes_later(tmp_path):
    outcomes = []
    file = Appended(
        epath.Path(tmp_path) / "lines", outcome=lambda _, error: outcomes.append(error is None)
    )
    records = [b"1" * 60, b"2" * 60, b"3" * 10]
    with no_file_larger_than(100):
        for record in records:
            file.write(record)
            assert (tmp_path / "lines").read_bytes() == records[0]  # and not 10 behind 60
    file.write(b"4")
    assert (tmp_path / "lines").read_bytes() == b"".join(records) + b"4"
    assert outcomes == [True, False, False, True]
    assert file.close() == 0


def test_full_disk_is_one_warning_and_no_line_is_lost(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("in the way")
    writer = MetricWriter(epath.Path(tmp_path), Restart(0, telemetry=True))
    for step in (1, 2):
        writer.write(step, "train", {"loss": 0.5})
    for name in ("metrics.jsonl", "tensorboard"):
        (tmp_path / name).unlink()
    writer.write(3, "train", {"loss": 0.5})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path)] == [1, 2, 3]
    (warning,) = caplog.messages
    assert "step 1 " in warning
    assert "No space left on device" in warning


def test_close_says_what_was_lost(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricWriter(epath.Path(tmp_path))
    writer.write(1, "train", {"loss": 0.5})
    writer.close()
    assert "1 " in caplog.messages[-1]
    assert str(tmp_path) in caplog.messages[-1]


def scalars(workdir) -> list[tuple[int, str]]:
    """(step, tag) of all that event files hold, which must be whole records."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content = file.read_bytes()
        read = list(events.events(content))
        assert b"".join(whole for _, whole in read) == content
        assert read[0][0].file_version == "brain.Event:2"
        found += [(event.step, v.tag) for event, _ in read for v in event.summary.value]
    return found


def log(workdir, steps: range, restart: Restart | None) -> None:
    """What a process of a run writes, with telemetry, training and validation at each step."""
    writer = MetricWriter(workdir, restart)
    writer.write(steps[0] + 1, "compile", {"seconds": 1.0})
    for step in steps:
        writer.write(step, "telemetry", {"site": [0.5, 1.5]})
        writer.write(step + 1, "train", {"loss": 0.5})
        writer.write(step + 1, "validation", {"loss": 0.5})
    writer.close()


@pytest.mark.parametrize("storage", ["bucket", "disk"])
def test_no_step_stands_twice_however_far_a_run_goes_back(storage, tmp_path, bucket):
    workdir = bucket if storage == "bucket" else epath.Path(tmp_path)
    log(workdir, range(0, 6), Restart(0, telemetry=True))
    torn = (workdir / "metrics.jsonl").read_bytes() + b'{"step": 6, "gro'
    (workdir / "metrics.jsonl").write_bytes(b"not one\n" + torn)
    for start in (4, 5, 2, 2):  # the last but one reaches back over two processes
        for number, file in enumerate(sorted((workdir / "tensorboard").iterdir())):
            torn = file.read_bytes() + b"\x18\x00\x00\x00"
            file.unlink()  # names differ by their seconds alone, which a test does not wait for
            (workdir / "tensorboard" / f"a.tfevents.{start}{number}").write_bytes(torn)
        log(workdir, range(start, 8), Restart(start, telemetry=True))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row["group"]) for row in rows]
    expected = {(step, "telemetry") for step in range(8)}
    expected |= {(step, group) for step in range(1, 9) for group in ("train", "validation")}
    expected |= {(1, "compile"), (3, "compile")}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    tags = scalars(workdir)
    assert len(tags) == len(set(tags))
    assert {(step, tag.split("/")[0]) for step, tag in tags} == expected


def test_telemetry_that_is_not_taken_again_stays(tmp_path):
    log(epath.Path(tmp_path), range(0, 3), None)
    writer = MetricWriter(epath.Path(tmp_path), Restart(2, telemetry=False))
    writer.write(3, "train", {"loss": 0.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (2, "telemetry") in [(row["step"], row["group"]) for row in rows]


def test_lines_of_others_stay(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"note": "mine"}\n{"step": 9, "group": "train"}\n')
    log(epath.Path(tmp_path), range(0, 1), Restart(0, telemetry=False))
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"note": "mine"}\n{"step": 1,')


def test_log_that_cannot_be_written_stops_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        progress = Progress(0, 10, "run")
        progress.note("said in vain")
        progress.report(1, {"loss": 0.5}, {})
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):  # or nothing was tried
            full.close()


def test_numbers_that_json_lacks_are_strings(tmp_path):
    writer = MetricWriter(epath.Path(tmp_path))
    writer.write(3, "train", {"loss": float("nan"), "parts": [1.0, float("inf")]})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 3, "group": "train", "loss": "nan", "parts": [1.0, "inf"]}


def test_trace_goes_to_a_bucket(bucket):
    profile = Profile(bucket, (1, 1), Clock(), lambda text: None)
    step = profile.around(lambda state, batch: state + batch, done=0)
    assert step(1, 2) + step(3, 4) == 10
    profile.close()
    names = {file.name for file in (bucket / "profile/plugins/profile/steps_1_1").iterdir()}
    assert any(name.endswith(".xplane.pb") for name in names)
