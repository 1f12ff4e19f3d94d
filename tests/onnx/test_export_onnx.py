"""ONNX folders by the real command line, and what is refused."""

import importlib
import json
import re
import sys

import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax import QuantSpec, UserError
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.cli.export_onnx import write_run
from quantizable_flax.data.tasks import make_task
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.onnx import graph
from quantizable_flax.onnx.opsets import LEAST
from quantizable_flax.onnx.write import check_model, check_spec, to_onnx, write_onnx
from quantizable_flax.ptq.settings import parse_setting
from quantizable_flax.training.loop import train
from tests.onnx.case import empty_past, make_case, session, worst
from tests.programs import ROOT, assert_mistake, run
from tests.small import small_model
from tests.tiny import tiny_config

SHORT = {"train__steps": 10, "checkpoint__every": 10}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a gated OPT."""
    folder = tmp_path_factory.mktemp("opt")
    config = tiny_config(folder, "opt", model__attention__gate="linear", **SHORT)
    train(config, str(folder / "run"))
    return folder / "run"


def test_a_run_as_integers(trained, tmp_path):
    done = run(
        "quantizable_flax.export",
        f"--workdir={trained}",
        "--to=onnx",
        "--quant=w8a8+channel",
        f"--out={tmp_path / 'out'}",
        "--calibration_seed=1",
        "--config.quant.coverage=all",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {tmp_path / 'out'}: model.onnx ")
    assert "Matrix products: 9 of integers, 1 in floating point" in done.stdout
    assert "gates stay in floating point" in done.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    known = "model.onnx quantization.json config.json tokenizer.json tokenizer_config.json"
    assert files == set(known.split())
    run_ = load_run(str(trained))
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer == run_.assets["tokenizer"]
    run_.config.quant.coverage = "all"
    evaluator = Evaluator(run_, make_task(run_.config, run_.assets))
    model, params, ranges = evaluator.calibrated(parse_setting("w8a8+channel"), 1)
    ids = np.arange(8, 24)[None]
    ours = model.apply({"params": params, "ranges": ranges}, ids)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    given |= empty_past(model.config, 1)
    theirs = session(str(tmp_path / "out" / "model.onnx")).run(["logits"], given)[0]
    assert worst(theirs, np.asarray(ours)) < 0.02


def test_the_page_runs_what_was_written(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, "bert", model__max_position_embeddings=64, **SHORT)
    train(config, str(tmp_path / "run"))
    folder = tmp_path / "runs" / "clipped_onnx"
    write_run(load_run(str(tmp_path / "run")), parse_setting("w8a8"), folder, LEAST, 0)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text())
    exec(compile(block, "docs/onnx.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['")


def test_a_run_in_floating_point(trained, tmp_path):
    shared = [f"--workdir={trained}", "--to=onnx", f"--out={tmp_path / 'out'}"]
    done = run("quantizable_flax.export", *shared, "--quant=none", "--opset=22")
    assert done.returncode == 0, done.stderr
    assert "Matrix products" not in done.stdout
    model, params = qf.load(str(trained))
    ids = np.arange(8, 24)[None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    given |= empty_past(model.config, 1)
    theirs = session(str(tmp_path / "out" / "model.onnx")).run(["logits"], given)[0]
    assert worst(theirs, np.asarray(model.apply({"params": params}, ids))) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--opset=17"], ["--opset must be in 20..24, found 17"]),
        (["--batch_size=8"], ["--batch_size is of another target, found it with --to=onnx"]),
        (["--quant=w8a8+token"], ["needs static ranges, found +token"]),
        (["--quant=w8a16"], ["more than 8 bits need --opset=21 or more, found --opset=20"]),
        (
            ["--quant=none", "--calibration_seed=1"],
            ["--calibration_seed is of another target, found it with --to=onnx --quant=none"],
        ),
        (
            ["--quant=none", "--config.quant.coverage=all"],
            ["--config.quant.coverage is of another"],
        ),
        (["--quant=w8b8"], ["must read like w8a8"]),
        (
            ["--out=/proc/nothing/x"],
            ["--out=/proc/nothing/x cannot be written", "choose another --out"],
        ),
        (["--out=FILE"], ["a new or an empty folder, found a file"]),
    ],
)
def test_mistakes(trained, tmp_path, arguments, parts):
    (tmp_path / "file").write_text("")
    given = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    shared = [f"--workdir={trained}", "--to=onnx", f"--out={tmp_path / 'new'}"]
    assert_mistake(run("quantizable_flax.export", *shared, *given), *parts)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_exact_is_refused():
    model, params = small_model("bert")
    plain = qf.with_quant(model, QuantSpec())
    with pytest.raises(UserError, match="no calibrated range, found none"):
        to_onnx(plain, params, {})
    with pytest.raises(UserError, match="found a model on integers"):
        check_spec(QuantSpec(backend="int8"), 20)
    with pytest.raises(UserError, match="more than 8 bits need --opset=21"):
        check_spec(QuantSpec(site_bits=((".*/scores", 16),)), 20)
    own = model.clone(config=model.config.__class__(softmax=lambda scores, mask: scores))
    with pytest.raises(UserError, match=r"needs a softmax that qf\.make_softmax gives"):
        check_model(own)
    with pytest.raises(UserError, match=r"written of Bert, OptForCausalLM, .*found Dense"):
        check_model(qf.Dense(3))
    pooled, _ = small_model("opt", {"gate": "linear", "gate_pooling": "all"})
    with pytest.raises(UserError, match="found gate_pooling=all: train with gate_pooling=none"):
        check_model(pooled)
    registers, _ = small_model("opt", num_registers=3)
    with pytest.raises(UserError, match=r"values has no registers, found model.num_registers=3"):
        check_model(registers)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "quantizable_flax.onnx.graph")
    with pytest.raises(UserError, match=r"needs the library onnx, .*quantizable_flax\[onnx\]"):
        importlib.import_module("quantizable_flax.onnx.graph")


def test_a_bucket_is_no_folder(trained):
    with pytest.raises(UserError, match="--out=gs://bucket/x must be a local folder"):
        write_run(load_run(str(trained)), None, "gs://bucket/x", 20, 0)


def test_a_large_model_has_its_weights_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "LARGEST_FILE", 2**14)
    case = make_case("vit", num_registers=1)
    write_onnx(tmp_path / "new", case.exported, case.model, eval_crop=0.9)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    # transformers has no registers: only what makes images into inputs is beside.
    known = "model.onnx model.onnx.data quantization.json preprocessor_config.json"
    assert files == set(known.split())
    assert (tmp_path / "new" / "model.onnx").stat().st_size < 2**16
    from tests.onnx.case import feeds, float_batch

    batch = float_batch("vit", case.model)
    given = feeds("vit", case.model.config, batch)
    theirs = session(str(tmp_path / "new" / "model.onnx")).run(None, given)[0]
    assert worst(theirs, case.ours(batch)) < 1e-5
