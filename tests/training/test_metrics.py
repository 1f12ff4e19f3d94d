"""Metric lines on a disk and in a bucket, which has no appending."""

import json
import types

import pytest
from etils import epath

from quantizable_flax.training import metrics
from quantizable_flax.training.metrics import UPLOAD_SECONDS, Clock, Lines, MetricWriter
from quantizable_flax.training.profiling import Profile


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_bucket_gets_whole_files_once_a_minute_and_at_the_end(bucket, clock):
    path = bucket / "metrics.jsonl"
    first = Lines(path)
    first.write("a")
    assert not path.exists()
    clock.now += UPLOAD_SECONDS
    first.write("b")
    assert path.read_text() == "a\nb\n"
    first.write("c")
    first.close()
    again = Lines(path)  # of the run continued
    again.write("d")
    again.close()
    assert path.read_text() == "a\nb\nc\nd\n"


def test_disk_gets_each_line_at_once(tmp_path):
    for line in ("a", "b"):
        lines = Lines(epath.Path(tmp_path) / "lines")
        lines.write(line)
        assert (tmp_path / "lines").read_text().endswith(line + "\n")
        lines.close()
    assert (tmp_path / "lines").read_text() == "a\nb\n"


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
