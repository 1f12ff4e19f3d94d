"""python -m quantizable_flax.inspect on a run, and on a folder as transformers has it."""

import json

import numpy as np
import pytest

from quantizable_flax.checkpoint.logged import history
from quantizable_flax.training.loop import train
from tests.programs import assert_mistake, run
from tests.tiny import tiny_config

INSPECT = "quantizable_flax.inspect"
SHORT = {
    "train__steps": 12,
    "train__telemetry_every": 4,
    "train__eval_every": 6,
    "checkpoint__every": 12,
    "model__attention__gate": "linear",
    "model__pad_token_id": 0,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    train(tiny_config(folder, **SHORT), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def published(workdir):
    """The same model as a folder of transformers."""
    out = workdir.parent / "published"
    done = run(
        "quantizable_flax.export", f"--workdir={workdir}", "--to=huggingface", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_run(workdir, tmp_path):
    page, figures = tmp_path / "new" / "page.html", tmp_path / "figures.json"
    done = run(INSPECT, f"--workdir={workdir}", f"--report={page}", f"--json={figures}")
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    row = found["row"]
    assert row["metric"] == "perplexity"
    assert {"w8a8", "w8a8+channel"} <= row.keys()
    for part in ("In W8A8 the ppl goes from", "In W8A8+channel", "Wrote", found["worst"]["site"]):
        assert part in done.stdout.replace("\n", " ")
    assert (
        done.stdout.index("Cost") < done.stdout.index("Where") < done.stdout.index("max inf norm")
    )
    text = page.read_text()
    dearest = "the 15 dearest sites in W8A8"
    for part in ("and what INT8 would cost", "Looked at", dearest, "<h2>Gates</h2>"):
        assert part in text
    assert len(found["heads"]["gate_means_LxH"][0]) == 2
    costs = [cost["increase"] for cost in found["sensitivity"]]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) > 20
    # Telemetry at steps 0, 4 and 8, the metric at 6 and 12.
    assert [step for step, _ in found["history"]["max_inf_norm"]] == [0, 4, 8]
    assert [step for step, _ in found["history"]["validation"]] == [6, 12]


def test_a_published_folder(published, tmp_path):
    figures = tmp_path / "figures.json"
    done = run(
        INSPECT,
        f"--workdir={published}",
        f"--config.data.files={published.parent / 'text.txt'}",
        f"--config.data.cache_dir={published.parent / 'cache'}",
        "--config.eval.batches=1",
        "--quant=w4a8+hadamard,w4a8,w4a8",
        f"--report={tmp_path / 'page.html'}",
        f"--json={figures}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["history"] == {"validation": [], "max_inf_norm": [], "avg_kurtosis": []}
    assert found["grid"]["setting"] == "w4a8"  # the other lies over rotated values
    # 64 tokens by default, of which the model has positions for 16.
    assert "1 batch of 32 examples of 16 tokens" in (tmp_path / "page.html").read_text()


def test_floating_point_alone(workdir, tmp_path):
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    done = run(
        INSPECT, f"--workdir={workdir}", "--quant=none", f"--report={page}", f"--json={figures}"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert "w8a8" not in found["row"]
    assert found["worst"]["site"] in done.stdout.replace("\n", " ")
    assert "and what INT8 would cost" not in page.read_text()


def test_what_a_run_has_logged(tmp_path):
    lines = [
        {"step": 4, "group": "telemetry", "a:inf_norm": 3.0, "b:inf_norm": 7.0, "a:kurtosis": 2.0},
        {"step": 4, "group": "validation", "loss": 1.0, "perplexity": "inf"},
        {"step": 2, "group": "validation", "perplexity": 9.0},
        {"step": 2, "group": "train", "perplexity": 1.0},
        {"step": 8, "group": "telemetry", "a:inf_norm": 5.0, "a:kurtosis": 2.0, "b:kurtosis": 4.0},
        {"step": 2, "group": "validation", "perplexity": 8.0},
        [1],
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "gro'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = history(str(tmp_path / "checkpoints" / "8"), "perplexity")
    assert found.validation == [(2, 8.0), (4, np.inf)]  # the last line of a step counts
    assert found.max_inf_norm == [(4, 7.0), (8, 5.0)]
    assert found.avg_kurtosis == [(4, 2.0), (8, 3.0)]
    assert history(str(tmp_path / "nothing"), "perplexity").validation == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--workdir is required"]),
        (["--workdir=nowhere"], ["nowhere does not exist"]),
        (["--workdir=RUN", "--quant=w8a"], ["'w8a'"]),
        (["--workdir=RUN", "--quant="], ["--quant is required"]),
        (["--workdir=RUN", "--report=RUN"], ["cannot write", "Is a directory"]),
        (["--workdir=RUN", "--report=x", "--json=./x"], ["must be two files, found x for both"]),
        (["--workdir=RUN", "--config.model.num_layers=3"], ["model.num_layers cannot be changed"]),
        (["--workdir=RUN", "--config.data.fils=x"], ["data.fils", "'files'"]),
        (["--workdir=RUN", "--config.eval.batches=99"], ["between 1 and"]),
        (["--workdir=RUN", "stray"], ["'stray'"]),
        (["--workdir=RUN", "--workdir=RUN"], ["one model, found --workdir 2 times", "eval.py"]),
        (
            ["--workdir=RUN", "--config.quant.calibration_batches=0"],
            ["quant.calibration_batches must be at least 1, found 0"],
        ),
    ],
)
def test_mistakes(workdir, arguments, parts):
    assert_mistake(run(INSPECT, *(a.replace("RUN", str(workdir)) for a in arguments)), *parts)
