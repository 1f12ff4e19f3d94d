"""Rates, utilisation and what a run says about itself, on a clock that the test moves."""

import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.config import default_config
from quantizable_flax.models.flops import step_flops
from quantizable_flax.runtime import progress as metrics
from quantizable_flax.runtime import throughput
from quantizable_flax.runtime.progress import Progress, duration, readable
from quantizable_flax.runtime.throughput import Throughput, memory


@pytest.fixture
def clock(monkeypatch):
    """A clock whose `now` is set by hand."""
    clock = types.SimpleNamespace(now=100.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", fake)
    monkeypatch.setattr(throughput, "time", fake)
    return clock


def mesh_of(kind: str, count: int = 4):
    device = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(
        devices=np.array([device] * count).reshape(2, count // 2, 1),
        shape={"data": 2, "fsdp": count // 2, "tensor": 1},
    )


@pytest.fixture
def config():
    config = default_config("bert")
    config.train.batch_size, config.train.steps = 64, 1000
    return config


def test_rates_are_those_of_training_and_shares_of_all_time(clock, config):
    times = Throughput(config, mesh_of("TPU v5 lite"), "sequences", start=10)
    for name, seconds in {"input": 2, "compile": 5, "checkpoint": 1, "evaluation": 2}.items():
        with times.lost[name]:
            clock.now += seconds
    clock.now += 10  # 20 seconds in all, 12 of them training
    values = times.measure(34)
    assert values["steps_per_second"] == pytest.approx(24 / 12)
    assert values["sequences_per_second"] == pytest.approx(64 * 2)
    assert values["tokens_per_second"] == pytest.approx(128 * 64 * 2)
    assert values["device_flops_per_second"] == pytest.approx(2 * step_flops(config) / 4)
    assert values["mfu"] == pytest.approx(2 * step_flops(config) / 4 / 197e12)
    shares = {name: values[f"{name}_share"] for name in throughput.LOSSES}
    assert shares == pytest.approx(
        {"input": 0.1, "compile": 0.25, "checkpoint": 0.05, "evaluation": 0.1, "profile": 0.0}
    )
    # Compilation does not come again, the rest does: 15 s for 24 steps.
    assert times.seconds_left() == pytest.approx((1000 - 34) * 15 / 24)
    assert times.summary(34) == (
        "24 steps in 20 s, input 10 %, compile 25 %, checkpoint 5 %, evaluation 10 %"
    )
    assert times.summary(10) is None


def test_rate_is_of_the_last_interval(clock, config):
    times = Throughput(config, mesh_of("cpu"), "sequences", start=0)
    clock.now += 100
    assert times.measure(10)["steps_per_second"] == pytest.approx(0.1)
    clock.now += 1
    second = times.measure(20)
    assert second["steps_per_second"] == pytest.approx(10)
    assert second["compile_share"] == 0
    # 10 s a step, then 0.1 s: the smoothed one lies between.
    assert 0.1 * 980 < times.seconds_left() < 10 * 980


def test_unknown_chips_have_no_utilisation_and_images_no_tokens(clock):
    config = default_config("vit")
    times = Throughput(config, mesh_of("cpu"), "images", start=0)
    clock.now += 1
    values = times.measure(1)
    assert "mfu" not in values
    assert "tokens_per_second" not in values
    assert values["images_per_second"] == pytest.approx(config.train.batch_size)


def test_only_the_first_call_is_compilation(clock, config):
    times = Throughput(config, mesh_of("cpu"), "sequences", start=0)
    noted = []

    def step(x):
        clock.now += 3
        return x + 1

    timed = times.timing_first(step, noted.append)
    assert [timed(1), timed(2)] == [2, 3]
    assert noted == [3]
    assert times.measure(2)["compile_share"] == pytest.approx(0.5)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(in_use, peak):
        stats = {"bytes_in_use": in_use, "peak_bytes_in_use": peak, "bytes_limit": 100}
        return types.SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(jax, "local_devices", lambda: [device(3, 7), device(5, 6)])
    assert memory() == {"memory_in_use": 5.0, "memory_peak": 7.0}
    nothing = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [nothing])
    assert memory() == {}


def test_description_names_mesh_parameters_and_formula(config):
    times = Throughput(config, mesh_of("TPU v5 lite"), "sequences", start=0)
    text = times.description({"a": jnp.zeros((30, 50)), "b": jnp.zeros(4)})
    assert text == (
        "mesh data=2 fsdp=2 tensor=1 (4 x TPU v5 lite, 1 process), 1.5k parameters, 5.47 TFLOP a "
        "step = 3 x 64 sequences x (projections 7.25G + attention 604M + ffn 14.5G + head 6.15G)"
    )


def test_line_in_a_log(capsys):
    progress = Progress(0, 1000, "mine")
    values = {
        "steps_per_second": 2.0,
        "sequences_per_second": 128.0,
        "tokens_per_second": 16384.0,
        "device_flops_per_second": 2.7e12,
        "mfu": 0.4142,
        "input_share": 0.25,
        "checkpoint_share": 0.02,
        "evaluation_share": 0.004,
        "memory_peak": 3 * 2.0**30,
    }
    progress.report(50, {"loss": 1.5}, values, 475.0)
    assert capsys.readouterr().err == (
        "mine: step 50/1000  loss 1.5  2 steps/s  128 sequences/s  16.4k tokens/s  MFU 41.4 %  "
        "peak 3.0 GiB  lost: input 25 % (waiting for data: raise data.workers), checkpoint 2 %  "
        "7 min 55 s left\n"
    )
    progress.report(1000, {"loss": 1.0}, {"device_flops_per_second": 2.7e12}, 0.0)
    assert capsys.readouterr().err == "mine: step 1000/1000  loss 1  2.7 TFLOP/s/device\n"


def test_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(40, 1000, "mine")
    progress.advance()
    progress.report(41, {"loss": 1.5}, {"steps_per_second": 2.0, "images_per_second": 8.0}, 9.0)
    progress.note("a note")
    progress.close()
    shown = terminal.getvalue()
    assert "41/1000" in shown
    assert "loss 1.5  8 images/s" in shown
    assert "a note\n" in shown


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (999.6, "1k"), (1.234e6, "1.23M"), (5e18, "5e+03P")]
)
def test_readable(value, text):
    assert readable(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (59.7, "1 min 0 s"), (18725, "5 h 12 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
