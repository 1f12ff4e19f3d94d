"""The runner of the table of methods: what it runs, what it keeps, and its means."""

import argparse
import importlib
import json
import math

import numpy as np
import pytest

from benchmarks import results, results_plot
from benchmarks.results_table import judged, pooled, table, write_table

METHODS = ["vanilla", "gated"]


def row(method, seed, fp, values, **more):
    """A row as the runner keeps it, of raw values over calibration seeds."""
    return {
        "method": method,
        "seed": seed,
        "calibration_seeds": len(values),
        "metric": "top1",
        "fp": fp,
        "max_inf_norm": 3.0,
        "avg_kurtosis": 4.0,
        "w8a8": float(np.mean(values)),
        "w8a8_std": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "w6a6": float(np.mean(values)) - 1,
        "w6a6_std": 0.0,
        "steps": 10,
        "seconds": 5.0,
        **more,
    }


def test_means_and_deviations_are_those_of_all_seeds():
    raw = {0: (90.0, [88.0, 89.0, 86.0]), 1: (92.0, [91.5, 90.0, 91.0])}
    rows = [row("vanilla", seed, fp, values) for seed, (fp, values) in raw.items()]
    costs = [fp - value for fp, values in raw.values() for value in values]
    assert pooled(rows, "w8a8") == pytest.approx((np.mean(costs), np.std(costs, ddof=1)))


def test_costs_of_perplexities_are_nats():
    values = [10.02, 10.05, 10.01]
    rows = [row("vanilla", 0, 10.0, values, metric="perplexity")]
    costs = np.log(np.array(values) / 10.0)
    mean, deviation = pooled(rows, "w8a8")
    # of the mean's logarithm, not the logarithms' mean: they part in the second order
    assert mean == pytest.approx(np.mean(costs), abs=1e-5)
    assert deviation == pytest.approx(np.std(costs, ddof=1), rel=5e-3)


def test_the_table_has_the_least_cost_first(tmp_path):
    rows = [row("vanilla", 0, 90.0, [80.0, 82.0]), row("gated", 0, 89.0, [88.0, 88.5])]
    file = tmp_path / "bert.json"
    file.write_text(json.dumps(rows))
    write_table(file)
    text = (tmp_path / "bert.md").read_text()
    assert text == table(rows)
    lines = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:1] == "|"]
    assert lines[2:] == ["gated", "vanilla"]
    # Of accuracies W4A4 decides where all rows have it.
    for one, value in zip(rows, (70.0, 60.0), strict=True):
        one |= {"w4a4": value, "w4a4_std": 0.0}
    assert judged(rows) == "w4a4"
    assert table(rows).splitlines()[-1].startswith("| gated")
    del rows[1]["w4a4"], rows[1]["w4a4_std"]
    assert judged(rows) == "w8a8"


def test_the_picture_has_every_seed_of_every_method_with_the_setting(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results_plot.plt, "close", shown.append)
    rows = [row("vanilla", seed, 90.0, [80.0, 82.0 + seed]) for seed in (0, 1)]
    rows += [row("gated", 0, 89.0, [88.0, 88.5]), row("other", 0, 89.0, [88.0])]
    del rows[-1]["w6a6"]
    results_plot.draw(rows, "w6a6", tmp_path / "bert.png")
    assert (tmp_path / "bert.png").read_bytes().startswith(b"\x89PNG")
    costs, norms = shown[0].axes
    assert [label.get_text() for label in costs.get_yticklabels()] == ["gated", "vanilla"]
    drawn = [bars.lines[0].get_xdata().tolist() for bars in costs.containers]
    assert drawn == [pytest.approx([89.0 - 87.25]), pytest.approx([90.0 - 80.0, 90.0 - 80.5])]
    assert [len(line.get_xdata()) for line in norms.lines] == [1, 2]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose commands write a row instead of training."""
    calls = []

    def call(command, log, cores):
        calls.append(command[1:])
        if command[1] == "eval.py":
            path = command[4].removeprefix("--json=")
            with open(path, "w") as file:
                found = row("", 0, 90.0, [1.0, 2.0])  # eval.py knows of no methods
                json.dump([{k: v for k, v in found.items() if k not in ("method", "seed")}], file)

    monkeypatch.setattr(results, "_call", call)
    options = argparse.Namespace(
        family="bert",
        seeds=[0, 1],
        calibration_seeds=2,
        quant="w8a8,w6a6",
        out=str(tmp_path / "out"),
        workdirs=str(tmp_path / "runs"),
    )
    return results.Study(options, ["--config.train.steps=3"]), calls


def test_what_has_a_row_is_not_run_again(study):
    study, calls = study
    assert study.missing(METHODS) == [(m, s) for s in (0, 1) for m in METHODS]
    study.run("vanilla", 1, None)
    train, evaluate = calls
    assert "--config=configs/results_bert.py:vanilla" in train
    assert train[-2:] == ["--config.seed=1", "--config.train.steps=3"]
    assert "--calibration_seeds=2" in evaluate
    again = results.Study(study.options, [])
    assert ("vanilla", 1) not in again.missing(METHODS)
    assert len(again.missing(METHODS)) == 3
    (kept,) = again.rows
    assert kept["overrides"] == ["--config.train.steps=3"]
    assert kept["method"] == "vanilla"


def test_a_setting_that_refuses_a_method_leaves_an_empty_cell(study):
    study, _ = study
    study.options.quant = "w8a8,w8a8+smooth"
    assert study.settings("vanilla") == "w8a8,w8a8+smooth"
    assert study.settings("rms_norm_single") == "w8a8"
    smooth = {"w8a8+smooth": 80.0, "w8a8+smooth_std": 0.0}
    rows = [row("vanilla", 0, 90.0, [80.0, 81.0], **smooth), row("other", 0, 90.0, [70.0, 71.0])]
    first, second = table(rows).splitlines()[-2:]
    assert "+10.000 ± 0.000" in first
    assert "|  |" in second
    rows.append(row("vanilla", 1, 90.0, [80.0, 81.0]))  # of before there was that setting
    assert "+10.000 ± 0.000" not in table(rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods=vanila"], "unknown: vanila; methods are vanilla, "),
        (["--quant=w99a99"], "must be in 2..16, found 99"),
        (["--jobs=0"], "must be at least 1"),
        (["--seeds=a"], "invalid numbers value: 'a'"),
        (["--steps=3"], "unknown: --steps=3"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("sys.argv", ["results", *arguments])
    monkeypatch.setattr(results, "Study", None)  # nothing gets as far
    with pytest.raises(SystemExit) as stopped:
        results.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_failure_is_told_with_its_reason(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("step 1\nerror: what it was\n\n")
    assert results.last_line(log) == "error: what it was"
    assert results.last_line(tmp_path / "none.log") == "it says nothing"


@pytest.mark.parametrize("family", results.FAMILIES)
def test_every_method_is_a_variant(family):
    recipe = importlib.import_module(f"configs.results_{family}")
    configs = {name: recipe.get_config(name) for name in recipe.VARIANTS}
    assert len({config.to_json() for config in configs.values()}) == len(configs)
    assert all(config.name == name for name, config in configs.items())
