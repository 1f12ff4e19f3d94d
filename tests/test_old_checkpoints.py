"""Checkpoints of version 0.1.0 load, with the logits that they had.

`runs_0_1_0.tar.xz` holds a run of two steps of each family that commit fa1ab5a wrote, and the
logits that it gave for them.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax.checkpoint.load import load_run

RUNS = Path(__file__).parent / "runs_0_1_0.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(RUNS) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("family", "asset"), [("bert", "tokenizer"), ("opt", "tokenizer"), ("vit", "classes")]
)
def test_logits_are_those_of_then(folder, family, asset):
    model, params = qf.load(str(folder / family))
    with np.load(folder / "logits.npz") as then:
        logits = model.apply({"params": params}, then[f"{family}/input"])
        # Products may sum in another order.
        expected = then[f"{family}/logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    run = load_run(str(folder / family))
    assert list(run.assets) == [asset]
    assert run.info["step"] == 2


def test_a_gate_that_looked_ahead_has_its_name_of_now(folder):
    attention = load_run(str(folder / "opt")).config.model.attention
    assert (attention.gate, attention.gate_pooling) == ("linear", "all")
