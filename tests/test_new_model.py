"""The family of docs/new_model.md trains, is quantized, run in integers, and written elsewhere."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.checkpoint.logged import History
from quantizable_flax.data.tasks import make_task
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.models import build
from quantizable_flax.ptq.settings import parse_setting
from quantizable_flax.report.subject import make_subject
from quantizable_flax.training.loop import train
from tests.tiny import overrides, write_text

PAGE = Path(__file__).parents[1] / "docs" / "new_model.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the family, which is known for as long, and its evaluator."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.read_text())
    with pytest.MonkeyPatch.context() as patch:
        for name in build.FAMILIES:  # so that the one that is added goes again
            patch.setitem(build.FAMILIES, name, build.FAMILIES[name])
        patch.setitem(build.FAMILIES, "encoder", None)
        exec(compile(block, str(PAGE), "exec"), {"__name__": "new_model"})
        folder = tmp_path_factory.mktemp("new")
        write_text(folder / "text.txt")
        config = qf.default_config("encoder")
        changes = {k: v for k, v in overrides(folder).items() if k != "model.max_predictions"}
        config.update_from_flattened_dict(changes)
        config.model.attention.gate = "mlp"
        train(config, str(folder / "run"))
        run = load_run(str(folder / "run"))
        yield run, Evaluator(run, make_task(run.config, run.assets))


def test_it_learns(trained):
    _, evaluator = trained
    assert 1 < evaluator.fp.value < 100  # of 160 words
    assert evaluator.fp.outliers["max_inf_norm"] > 0
    assert evaluator.fp.outliers["avg_kurtosis"] > 1


@pytest.mark.parametrize("name", ["w8a8", "w8a8+smooth=0.5", "w8a8+hadamard+channel"])
def test_it_is_quantized_and_runs_in_integers(trained, name):
    run, evaluator = trained
    setting = parse_setting(name)
    model, params, ranges = evaluator.calibrated(setting)
    ids = np.arange(32).reshape(2, 16) + 5
    simulated = jax.jit(model.apply)({"params": params, "ranges": ranges}, ids)
    native, codes = evaluator.int8(setting)
    found = jax.jit(native.apply)({"params": codes}, ids)
    np.testing.assert_allclose(found, simulated, atol=1e-4 * np.abs(simulated).max())
    exact = jax.jit(run.model.apply)({"params": run.params}, ids)
    assert 0 < np.abs(simulated - exact).max() < 0.3 * np.abs(exact).max()


def test_it_can_be_looked_into(trained):
    _, evaluator = trained
    subject = make_subject(evaluator, {"name": "new"}, [], History())
    assert set(subject.anatomy.sites) >= {"position_sum", "layer_0/ffn_residual"}
    assert subject.anatomy.heads.gates_LxHxT.shape == (1, 2, 16)
    assert len(subject.anatomy.tokens) == 16
    assert (subject.grid, subject.costs) == (None, [])


def test_its_weights_are_written_and_read_under_their_names(trained):
    run, _ = trained
    tensors = qf.to_state_dict(run.params, run.config)
    assert tensors["encoder.layers.0.attn.alpha.1.2.weight"].shape == (1, 4)
    np.testing.assert_array_equal(tensors["head.weight"], tensors["encoder.words.weight"])
    kernel = run.params["layer_0"]["attention"]["output"]["kernel"]
    np.testing.assert_array_equal(tensors["encoder.layers.0.attn.out.weight"], kernel.T)
    older = {f"module.{name.replace('attn.out', 'attn.proj')}": w for name, w in tensors.items()}
    for mapping in (tensors, older):
        found = qf.from_state_dict(mapping, run.config)
        jax.tree.map(np.testing.assert_array_equal, found, run.params)
    del tensors["encoder.layers.0.fc1.bias"]
    with pytest.raises(qf.UserError, match=r"no tensor 'encoder.layers.0.fc1.bias'"):
        qf.from_state_dict(tensors, run.config)
