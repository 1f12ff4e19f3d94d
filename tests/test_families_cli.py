"""The command lines for OPT and ViT: train, evaluate together, generate."""

import json
import subprocess

import pytest

from tests.programs import assert_mistake, run
from tests.tiny import flags


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a finished run of each family, by family."""
    folder = tmp_path_factory.mktemp("families")
    recipes = {"bert": "quickstart:clipped", "opt": "opt_tiny:gated", "vit": "vit_digits:vanilla"}
    for family, recipe in recipes.items():
        name, variant = recipe.split(":")
        done = run(
            "train.py",
            f"--config=configs/{name}.py:{variant}",
            f"--workdir={folder / family}",
            *flags(folder, family),
        )
        assert done.returncode == 0, done.stderr
        assert "step 80/80" in done.stderr
    return {family: folder / family for family in recipes}


def generate(*arguments: str) -> subprocess.CompletedProcess:
    return run("quantizable_flax.generate", *arguments)


def test_one_table_and_report_of_all_families(runs, tmp_path):
    done = run(
        "eval.py",
        *(f"--workdir={path}" for path in runs.values()),
        "--quant=w4a8",
        "--calibration_seeds=1",
        f"--json={tmp_path / 'rows.json'}",
        f"--markdown={tmp_path / 'rows.md'}",
        f"--report={tmp_path / 'report.html'}",
    )
    # The clipped BERT recipe runs with fp32_head, ViT's default is all.
    assert done.returncode == 0, done.stderr
    rows = {row["model"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert [rows[family]["metric"] for family in runs] == ["perplexity", "perplexity", "top1"]
    assert 0 <= rows["vit"]["fp"] <= 100
    for row in rows.values():
        assert row["fp_loss"] > 0
        assert row["max_inf_norm"] > 0
        assert {"w4a8", "w4a8_std"} <= row.keys()
    header = (tmp_path / "rows.md").read_text().splitlines()[0]
    assert "| metric | FP |" in header
    assert "top-1 %" in (tmp_path / "rows.md").read_text()
    report = (tmp_path / "report.html").read_text()
    for family in runs:
        assert f"<h3>{rows[family]['name']}: infinity norm of every site</h3>" in report
    # A picture of the cost for each of the two metrics; no validation was logged.
    assert report.count("What each setting costs:") == 2
    assert "How they grew in training" not in report


@pytest.mark.parametrize("setup", ["all", "fp32_head+int16_all_LN"])
def test_published_setups_of_opt(runs, tmp_path, setup):
    done = run(
        "eval.py",
        f"--workdir={runs['opt']}",
        "--quant=w4a4",
        "--calibration_seeds=1",
        f"--config.quant.coverage={setup}",
        f"--json={tmp_path / 'rows.json'}",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["w4a4"] > row["fp"]


@pytest.mark.parametrize(
    ("family", "argument", "parts"),
    [
        ("opt", "--config.quant.coverage=fp32_hed", ["'fp32_hed'", "'fp32_head'"]),
        ("vit", "--config.eval.outliers=tokens", ["'tokens'", "'token'"]),
        ("opt", "--config.data.tokenizer.file=README.md", ["README.md"]),
        ("vit", "--config.data.source=tfds:nothing_here", ["nothing_here"]),
    ],
)
def test_eval_mistakes(runs, family, argument, parts):
    assert_mistake(run("eval.py", f"--workdir={runs[family]}", "--quant=w8a8", argument), *parts)


def test_generation_continues_the_prompt(runs):
    arguments = [f"--workdir={runs['opt']}", "--prompt=the quick", "--max_new_tokens=6"]
    greedy, again = generate(*arguments), generate(*arguments)
    assert greedy.returncode == 0, greedy.stderr
    assert greedy.stdout.startswith("the quick")
    assert len(greedy.stdout) > len("the quick\n")
    assert greedy.stdout == again.stdout
    drawn = generate(*arguments, "--temperature=5.0", "--seed=1")
    assert drawn.stdout != greedy.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workdir=BERT", "--prompt=a"], ["causal model", "found Bert"]),
        (["--workdir=OPT"], ["--prompt is required"]),
        (["--workdir=OPT", "--prompt=a", "--max_new_tokens=99"], ["16 positions"]),
        (["--workdir=OPT", "--prompt=a", "--top_p=0"], ["top_p"]),
    ],
)
def test_generation_mistakes(runs, arguments, parts):
    given = [
        a.replace("BERT", str(runs["bert"])).replace("OPT", str(runs["opt"])) for a in arguments
    ]
    assert_mistake(generate(*given), *parts)
