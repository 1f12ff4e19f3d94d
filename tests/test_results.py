"""The runner of the table of methods: what it runs, what it keeps, and its means."""

import argparse
import importlib
import json
import re

import pytest

from benchmarks import results, results_study
from benchmarks.results_study import Study
from benchmarks.results_table import table
from quantizable_flax.errors import UserError
from tests.results_rows import row, setting

METHODS = ["vanilla", "gated"]
MADE_BY = ("method", "seed", "overrides")  # of a row, what eval.py knows nothing of


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose commands write a row instead of training."""
    calls = []

    def call(command, log, cores):
        calls.append(command[1:])
        if command[1] == "eval.py":
            path = command[4].removeprefix("--json=")
            with open(path, "w") as file:
                found = row("", 0, 2.0, [2.1, 2.2])
                json.dump([{k: v for k, v in found.items() if k not in MADE_BY}], file)

    monkeypatch.setattr(results_study, "_call", call)
    options = argparse.Namespace(
        family="bert",
        seeds=[0, 1],
        calibration_seeds=2,
        quant="w8a8,w6a6",
        out=str(tmp_path / "out"),
        workdirs=str(tmp_path / "runs"),
    )
    return Study(options, ["--config.train.steps=3"]), calls


def test_what_has_a_row_is_not_run_again(study):
    study, calls = study
    assert study.missing(METHODS) == [(m, s) for s in (0, 1) for m in METHODS]
    study.run("vanilla", 1, None)
    train, evaluate = calls
    assert "--config=configs/results_bert.py:vanilla" in train
    assert train[-2:] == ["--config.seed=1", "--config.train.steps=3"]
    assert "--calibration_seeds=2" in evaluate
    again = Study(study.options, study.overrides)
    assert ("vanilla", 1) not in again.missing(METHODS)
    assert len(again.missing(METHODS)) == 3
    (kept,) = again.rows
    assert kept["overrides"] == ["--config.train.steps=3"]
    assert kept["method"] == "vanilla"


def test_no_run_goes_on_with_what_other_overrides_trained(study):
    study, calls = study
    study.run("vanilla", 0, None)
    alike = argparse.Namespace(**vars(study.options))
    alike.out += "_other"
    Study(alike, []).run("vanilla", 0, None)
    workdirs = [call[2] for call in calls if call[0] == "train.py"]
    assert workdirs[0] != workdirs[1]
    assert workdirs[1].endswith("vanilla-0")


@pytest.mark.parametrize(
    ("overrides", "options", "found"),
    [
        ([], {}, "overrides ['--config.train.steps=3'], found []"),
        (["--config.train.steps=3"], {"calibration_seeds": 3}, "calibration_seeds 2, found 3"),
        (["--config.train.steps=3"], {"quant": "w4a4"}, "w8a8, none of which is among"),
    ],
)
def test_a_table_has_rows_that_can_be_compared(study, overrides, options, found):
    study, _ = study
    study.run("vanilla", 0, None)
    before = study.file.read_text()
    with pytest.raises(UserError, match=re.escape(found)):
        Study(argparse.Namespace(**vars(study.options) | options), overrides)
    assert study.file.read_text() == before


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
        (["--config.train.stepz=3"], "train.stepz (did you mean 'steps'?)"),
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
    assert results_study.last_line(log) == "error: what it was"
    assert results_study.last_line(tmp_path / "none.log") == "it says nothing"


@pytest.mark.parametrize("family", results.FAMILIES)
def test_every_method_is_a_variant(family):
    recipe = importlib.import_module(f"configs.results_{family}")
    configs = {name: recipe.get_config(name) for name in recipe.VARIANTS}
    assert len({config.to_json() for config in configs.values()}) == len(configs)
    assert all(config.name == name for name, config in configs.items())
