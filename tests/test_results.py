"""The runner of the table of methods: what it runs, what it keeps, and its means."""

import argparse
import importlib
import json
import math

import numpy as np
import pytest

from benchmarks import results, results_plot
from benchmarks.results_table import PAGE, by_seed, judged, pooled, table, write_table

METHODS = ["vanilla", "gated"]


def row(method, seed, fp_loss, losses, **more):
    """A row as the runner keeps it, of losses over calibration seeds."""
    return {
        "method": method,
        "seed": seed,
        "calibration_seeds": len(losses),
        "metric": "perplexity",
        "fp": math.exp(fp_loss),
        "fp_loss": fp_loss,
        "max_inf_norm": 3.0,
        "avg_kurtosis": 4.0,
        **setting("w8a8", losses),
        "steps": 10,
        "seconds": 5.0,
        **more,
    }


def setting(name, losses):
    """What a row has of one."""
    deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan
    return {
        name: float(np.mean(np.exp(losses))),
        f"{name}_std": 0.0,
        f"{name}_loss": float(np.mean(losses)),
        f"{name}_loss_std": deviation,
    }


@pytest.mark.parametrize(("metric", "unit"), [("perplexity", "nats per token"), ("top1", "image")])
def test_costs_are_increases_of_the_loss_over_all_seeds(metric, unit):
    raw = {0: (2.0, [2.1, 2.2, 2.05]), 1: (1.9, [2.3, 2.0, 2.1])}
    rows = [row("a", seed, fp, losses, metric=metric) for seed, (fp, losses) in raw.items()]
    costs = [loss - fp for fp, losses in raw.values() for loss in losses]
    assert pooled(rows, "w8a8") == pytest.approx((np.mean(costs), np.std(costs, ddof=1)))
    assert f"{unit})" in table(rows).splitlines()[0]


def test_the_table_has_the_least_cost_first(tmp_path):
    rows = [row("vanilla", 0, 2.0, [2.4, 2.5]), row("gated", 0, 2.1, [2.2, 2.3])]
    file = tmp_path / "bert.json"
    file.write_text(json.dumps(rows))
    write_table(file)
    text = (tmp_path / "bert.md").read_text()
    assert text == table(rows)
    lines = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:1] == "|"]
    assert lines == 2 * ["method", "---", "gated", "vanilla"]
    # W6A6 decides where all rows have it.
    rows[0] |= setting("w6a6", [2.5, 2.6])
    assert judged(rows) == "w8a8"
    rows[1] |= setting("w6a6", [2.9, 3.0])
    assert judged(rows) == "w6a6"
    assert table(rows).splitlines()[-1].startswith("| gated")


def test_a_page_has_what_each_training_seed_has_and_keeps_the_rest(tmp_path):
    rows = [row("gated", seed, 2.0, [2.1 + seed, 2.2 + seed]) for seed in (1, 0)]
    rows += [row("vanilla", 0, 2.0, [9.0])]
    marks = "<!-- table of {} -->\n\nold\n<!-- end of the table of {} -->\n"
    page = tmp_path / "results.md"
    page.write_text("before\n" + marks.format("bert", "bert") + marks.format("opt", "opt"))
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "bert.json"
    file.write_text(json.dumps(rows))
    write_table(file)
    write_table(file)  # again: the same
    shown = by_seed(rows, PAGE)
    assert "| gated | 7.389, 7.389 | " in shown
    assert shown.splitlines()[2].endswith(" | +0.1500, +1.1500 |")
    assert shown in table(rows)
    assert page.read_text() == (
        "before\n" + marks.format("bert", "bert").replace("old", shown) + marks.format("opt", "opt")
    )


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_the_docs_have_the_tables_of_their_rows(family):
    file = results.ROOT / f"docs/results/{family}.json"
    rows = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == table(rows)
    page = (results.ROOT / "docs/results.md").read_text()
    assert f"<!-- table of {family} -->\n\n{by_seed(rows, PAGE)}\n<!-- end" in page


def test_the_picture_has_every_seed_of_every_method_with_the_setting(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results_plot.plt, "close", shown.append)
    w6a6 = setting("w6a6", [2.6, 2.6])
    rows = [row("vanilla", seed, 2.0, [2.3, 2.5 + seed], **w6a6) for seed in (0, 1)]
    rows += [row("gated", 0, 2.5, [2.6, 2.7], **w6a6), row("other", 0, 2.0, [2.1])]
    results_plot.draw(rows, "w6a6", tmp_path / "bert.png")
    assert (tmp_path / "bert.png").read_bytes().startswith(b"\x89PNG")
    costs, norms = shown[0].axes
    assert [label.get_text() for label in costs.get_yticklabels()] == ["gated", "vanilla"]
    drawn = [bars.lines[0].get_xdata().tolist() for bars in costs.containers]
    assert drawn == [pytest.approx([0.1]), pytest.approx([0.6, 0.6])]
    assert [len(bars.lines[0].get_xdata()) for bars in norms.containers] == [1, 2]
    # One far away is a number, so that the others stay apart.
    rows[1] |= {"max_inf_norm": 3.0 * results_plot.FAR + 1}
    results_plot.draw(rows, "w6a6", tmp_path / "bert.png")
    costs, norms = shown[1].axes
    assert [text.get_text() for text in norms.texts] == ["25 \N{RIGHTWARDS ARROW}"]
    assert norms.get_xlim()[1] < 4
    assert not costs.texts


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose commands write a row instead of training."""
    calls = []

    def call(command, log, cores):
        calls.append(command[1:])
        if command[1] == "eval.py":
            path = command[4].removeprefix("--json=")
            with open(path, "w") as file:
                found = row("", 0, 2.0, [2.1, 2.2])  # eval.py knows of no methods
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
    smooth = setting("w8a8+smooth", [2.25, 2.25])
    rows = [row("vanilla", 0, 2.0, [2.1, 2.2], **smooth), row("other", 0, 2.0, [2.3, 2.4])]
    first, second = table(rows).splitlines()[-2:]
    assert "+0.2500 ± 0.0000" in first
    assert "|  |" in second
    rows.append(row("vanilla", 1, 2.0, [2.1, 2.2]))  # of before there was that setting
    assert "+0.2500 ± 0.0000" not in table(rows)


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
