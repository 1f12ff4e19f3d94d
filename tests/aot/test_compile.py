"""Compilation ahead of time: its inputs are those of training, and its figures add up."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from quantizable_flax.aot import compile as aot
from quantizable_flax.aot import report, topology
from quantizable_flax.aot.candidates import candidates
from quantizable_flax.aot.estimate import Compiled, Estimate, measure
from quantizable_flax.config import default_config
from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.models.flops import step_flops
from quantizable_flax.ptq.trained import learns_ranges, model_to_train
from quantizable_flax.runtime.chips import chip_of
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import abstract_state, init_state
from tests.tiny import flags, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_batches_are_as_the_data_give_them(tmp_path, family):
    config = tiny_config(tmp_path, family)
    data = train_iterator(make_task(config), batch_size=8, seed=0)
    batch = next(data)
    data.close()
    specs = batch_specs(config)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == specs
    mesh = make_mesh(config.mesh)
    placed, abstract = put_batch(batch, mesh), aot.abstract_batch(config, mesh)
    assert {k: (v.shape, v.dtype, v.sharding) for k, v in placed.items()} == {
        k: (v.shape, v.dtype, v.sharding) for k, v in abstract.items()
    }


@pytest.mark.parametrize("ranges", ["none", "running", "learned"])
def test_the_state_is_that_of_training(tmp_path, ranges):
    changes = {} if ranges == "none" else {"quant__train": True, "quant__train_ranges": ranges}
    config = tiny_config(tmp_path, **changes)
    mesh, model = make_mesh(config.mesh), model_to_train(config)
    inputs = (model, make_optimizer(config, 80), model.example_batch())
    learned = learns_ranges(config)
    state = init_state(*inputs, 0, mesh, learned_ranges=learned)
    abstract = abstract_state(*inputs, mesh, learned_ranges=learned)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    described = [
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (state, abstract)
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize(
    ("family", "accumulate"),
    [
        ("bert", 4),
        ("vit", 1),
        pytest.param("bert", 1, marks=pytest.mark.slow),
        pytest.param("vit", 4, marks=pytest.mark.slow),
    ],
)
def test_figures_of_a_step_compiled_for_this_machine(tmp_path, family, accumulate):
    changes = {
        "train__grad_accum_steps": accumulate,
        "model__hidden_size": 64,
        "model__num_layers": 3,
    }
    if family == "vit":  # the shares of Mixup are drawn in loops that end by chance
        changes |= {"model__mixup_alpha": 0.0, "model__cutmix_alpha": 0.0}
    config = tiny_config(tmp_path, family, **changes)
    devices = jax.devices()[:1]
    lowered, mesh = aot.lower(config, devices)
    figures = measure(lowered.compile(), 1, 0.0)
    assert dict(mesh.shape)["data"] == 1
    assert figures.wire_bytes == {}
    assert figures.unknown_loops == 0
    # XLA computes no gradient of the input of the first product, a patch embedding.
    assert figures.flops == pytest.approx(step_flops(config), rel=0.1)
    state = figures.arguments - sum(
        int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in batch_specs(config).values()
    )
    assert figures.aliased == pytest.approx(state, rel=0.05)


def test_candidates_are_all_combinations(tmp_path):
    config = tiny_config(tmp_path)
    found = candidates(
        config,
        ["v5e:2x2", "v6e:4x4"],
        ["train.batch_size=16,32", "mesh=data=-1|data=1,fsdp=2,tensor=2", "model.dtype=bfloat16"],
    )
    assert len(found) == 8
    assert found[0].label == "v5e:2x2 train.batch_size=16 mesh=data=-1 model.dtype=bfloat16"
    last = found[-1]
    assert (last.topology, last.config.train.batch_size) == ("v6e:4x4", 32)
    assert (last.config.mesh.data, last.config.mesh.fsdp, last.config.mesh.tensor) == (1, 2, 2)
    assert last.config.model.dtype == "bfloat16"
    assert (config.train.batch_size, config.mesh.data) == (8, -1)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("train.batch_siz=3", "unknown configuration key train.batch_siz .did you mean"),
        ("train.batch_size=8,x", "could not be read"),
        ("train.batch_size", "must be a key and its values"),
        ("train.batch_size=8,,9", "must be a key and its values"),
        ("mesh=fdsp=2", "did you mean 'fsdp'"),
    ],
)
def test_a_mistake_in_what_varies(vary, message):
    with pytest.raises(UserError, match=message):
        candidates(default_config(), ["v5e:2x2"], [vary])


def test_a_key_varies_once():
    with pytest.raises(UserError, match="given twice"):
        candidates(default_config(), ["v5e:2x2"], ["seed=1", "seed=2"])


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "h100:2x2", "v5e:2x", "2x2"])
def test_a_mistake_in_the_topology(name):
    with pytest.raises(UserError, match=r"v5e:2x2.*found"):
        topology.chip_of_topology(name)


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install libtpu"):
        topology.prepare()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (219.90G) exceeds available HBM (15.75G).",
            "does not fit: needs 219.90G of the 15.75G of HBM",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal",
            "does not fit: needs 20.50G of the 15.75G of HBM",
        ),
        ("RESOURCE_EXHAUSTED: vmem", "does not fit into the HBM: RESOURCE_EXHAUSTED: vmem"),
        ("INTERNAL: no\nstack", "the compiler refuses it: INTERNAL: no"),
    ],
)
def test_why_nothing_was_compiled(message, said):
    assert aot.why(message) == said


def rows() -> list[Estimate]:
    chip = chip_of("v5e")
    assert chip is not None
    compiled = Compiled(
        arguments=2 * 2**30, outputs=2 * 2**30, aliased=2 * 2**30, temporaries=3 * 2**30,
        code=2**29, flops=1.97e12, reported_flops=2e12, hbm_bytes=8.19e9,
        wire_bytes={"all-reduce": 1e9, "all-gather": 1e9},
        largest=("1000 MB all-reduce of f32[9]",), unknown_loops=0, seconds=1.0,
    )  # fmt: skip
    known = {"chip": chip, "devices": 4, "mesh": {"data": 2, "fsdp": 2}, "batch_size": 64}
    known |= {"tokens": 128, "model_flops": 9.85e11}
    fits = Estimate("v5e:2x2", {"mesh": "data=-1"}, compiled=compiled, waiting=2**29, **known)
    large = Estimate("v5e:2x2", {"mesh": "fsdp=4"}, reason="does not fit: a | b", **known)
    return [fits, large]


def test_the_bound_is_the_slowest_part():
    row, large = rows()
    assert row.peak == 6 * 2**30
    assert row.fits
    assert row.times == pytest.approx({"compute": 0.01, "HBM": 0.01, "interconnect": 0.01})
    assert row.examples_per_second == pytest.approx(6400)
    assert row.utilisation == pytest.approx(0.5)
    assert not large.fits
    assert large.as_json()["reason"] == "does not fit: a | b"
    assert "bound_seconds" not in large.as_json()


def test_table_and_report_of_the_same_figures():
    row, large = rows()
    head, line, first, second = report.table([row, large]).splitlines()
    assert len({text.count("|") for text in (head, line, first, second)}) == 1
    assert "6 / 16" in first
    assert "yes" in first
    assert "0.819M tokens" in first
    assert "does not fit: a / b" in second
    assert "why not" not in report.table([row])
    text = report.report(row)
    assert "6.000 of 16 GiB HBM (38%)" in text
    assert "1000 MB sent" in text
    assert "1000 MB all-reduce of f32[9]" in text
    assert "10.000 ms a step" in text
    assert "no: does not fit" in report.report(large)


def train_py(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", "--config=configs/quickstart.py:clipped", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_flags_of_another_mode_are_refused():
    done = train_py("--aot_vary=seed=1", "--workdir=unused")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: --aot_* flags are of --aot: name a slice, as --aot=v5e:2x2."
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_recipe_compiled_for_a_tpu(tmp_path):
    files = {kind: tmp_path / f"aot.{kind}" for kind in ("json", "md")}
    recipe = flags(tmp_path, model__dtype="bfloat16", model__hidden_size=128, train__batch_size=32)
    done = train_py(
        *recipe,
        "--aot=v5e:2x2",
        "--aot_vary=train.batch_size=32,6",
        "--aot_vary=model.vocab_size=160,200000000",
        f"--aot_json={files['json']}",
        f"--aot_markdown={files['md']}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiling") == 4
    assert "multiple of" in done.stdout
    assert "| v5e:2x2 |" in files["md"].read_text()
    written = json.loads(files["json"].read_text())
    assert set(written["versions"]) == {"jax", "jaxlib", "libtpu"}
    data, large, *odd = written["candidates"]
    assert all("multiple of" in row["reason"] for row in odd)
    assert re.fullmatch(r"does not fit: needs [\d.]+G of the 15.75G of HBM", large["reason"])
    check_fitting(data)
    assert set(data["compiled"]["wire_bytes"]) == {"all-reduce"}

    mixed_json = tmp_path / "mixed.json"
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    done = train_py(*recipe, *mesh, "--aot=v5e:2x2", f"--aot_json={mixed_json}")
    assert done.returncode == 0, done.stderr
    assert "GiB HBM" in done.stdout
    (mixed,) = json.loads(mixed_json.read_text())["candidates"]
    check_fitting(mixed)
    # What tensor and fsdp split is sent in parts and gathered.
    assert len(mixed["compiled"]["wire_bytes"]) > 1
    assert mixed["compiled"]["arguments"] < data["compiled"]["arguments"]


def check_fitting(row: dict) -> None:
    assert row["fits"]
    assert row["compiled"]["flops"] == pytest.approx(row["model_flops"], rel=0.1)
    assert row["bound_seconds"] == max(row["seconds"].values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_slice_that_libtpu_does_not_have():
    done = train_py("--aot=v5e:3x3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: libtpu has no slice v5e:3x3: ")
    assert "take one as" in done.stderr
