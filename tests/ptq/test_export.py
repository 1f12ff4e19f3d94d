"""INT8 checkpoints and programs, by the real command line and in processes of their own."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax import UserError
from quantizable_flax.checkpoint import export
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.data.tasks import make_task
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.ptq.settings import parse_setting
from quantizable_flax.training.loop import train
from tests.programs import ROOT, assert_mistake, run
from tests.tiny import tiny_config

SEED = 1  # of calibration: not the default
# Runs a program with nothing but JAX and numpy.
ALONE = """
import json, pathlib, sys
import jax, numpy as np
from jax import export
folder = pathlib.Path(sys.argv[1])
program = export.deserialize((folder / "model.stablehlo").read_bytes())
inputs = np.load(sys.argv[2])
names = [x["name"] for x in json.loads((folder / "model.json").read_text())["inputs"]]
np.save(sys.argv[3], jax.jit(program.call)(*(inputs[name] for name in names)))
assert not {"flax", "quantizable_flax", "aqt", "orbax"} & {m.split(".")[0] for m in sys.modules}
"""
LOAD = """
import sys
import jax, numpy as np
import quantizable_flax as qf
model, params = qf.load(sys.argv[1])
inputs = np.load(sys.argv[2])
np.save(sys.argv[3], jax.jit(model.apply)({"params": params}, *inputs.values()))
"""


def trained(folder, family: str):
    """The workdir of a run of a few steps."""
    layers = 2 if family == "opt" else 1
    config = tiny_config(
        folder, family, model__num_layers=layers, train__steps=10, checkpoint__every=10
    )
    train(config, str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(family, workdir of a run, folder of its export), by the command line."""
    folder = tmp_path_factory.mktemp("bert")
    workdir = trained(folder, "bert")
    done = run(
        "quantizable_flax.export",
        f"--workdir={workdir}",
        "--to=int8",
        f"--out={folder / 'int8'}",
        "--quant=w8a8",
        "--config.quant.coverage=all",
        "--batch_size=3",
        f"--calibration_seed={SEED}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {folder / 'int8'}: parameters ")
    progress = [
        f"step 10 of {workdir}, to int8",
        f"calibrating w8a8 on 2 batches of 8, seed {SEED}",
        f"writing {folder / 'int8'}",
    ]
    assert [line for line in done.stderr.splitlines() if line in progress] == progress
    return "bert", workdir, folder / "int8"


@pytest.fixture(
    scope="module",
    params=["bert", *(pytest.param(x, marks=pytest.mark.slow) for x in ("opt", "vit"))],
)
def exported(request, tmp_path_factory):
    """The same for each family, OPT and ViT in this process."""
    if request.param == "bert":
        return request.getfixturevalue("bert")
    folder = tmp_path_factory.mktemp(request.param)
    workdir = trained(folder, request.param)
    run_ = load_run(str(workdir))
    export.export_int8(
        export.check_folder(str(folder / "int8"), "--out"),
        *evaluator_of(workdir).int8(parse_setting("w8a8"), SEED),
        run_.notes,
        batch_size=3,
        seq_len=run_.config.data.get("seq_len"),
        float32_bytes=export.size_in_bytes(run_.params),
    )
    return request.param, workdir, folder / "int8"


def evaluator_of(workdir) -> Evaluator:
    run_ = load_run(str(workdir))
    run_.config.quant.coverage = "all"
    return Evaluator(run_, make_task(run_.config, run_.assets))


def inputs_of(family: str, folder) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for x in json.loads((folder / "model.json").read_text())["inputs"]:
        high = 256 if family == "vit" else 100
        arrays[x["name"]] = rng.integers(5, high, x["shape"]).astype(x["dtype"])
    if "attention_mask" in arrays:
        arrays["attention_mask"] = np.ones_like(arrays["attention_mask"])
        arrays["attention_mask"][1, -4:] = 0
    return arrays


def in_new_process(program: str, *arguments) -> np.ndarray:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(arguments[-1])


def test_logits_are_the_same_in_other_processes(exported, tmp_path):
    family, workdir, folder = exported
    inputs = inputs_of(family, folder)
    np.savez(tmp_path / "inputs.npz", **inputs)
    # What the export started from: calibrated in this process, with the simulation beside it.
    evaluator, setting = evaluator_of(workdir), parse_setting("w8a8")
    model, params, ranges = evaluator.calibrated(setting, SEED)
    simulated = jax.jit(model.apply)({"params": params, "ranges": ranges}, *inputs.values())
    model, params = evaluator.int8(setting, SEED)
    native = jax.jit(model.apply)({"params": params}, *inputs.values())
    loaded = in_new_process(LOAD, folder, tmp_path / "inputs.npz", tmp_path / "loaded.npy")
    alone = in_new_process(ALONE, folder, tmp_path / "inputs.npz", tmp_path / "alone.npy")
    np.testing.assert_array_equal(native, loaded)
    np.testing.assert_array_equal(native, alone)
    np.testing.assert_allclose(native, simulated, atol=1e-4 * np.abs(simulated).max())


def test_checkpoint_holds_integers(exported):
    _, workdir, folder = exported
    model, params = qf.load(str(folder))
    assert model.config.quant.backend == "int8"
    kernel = params["layer_0"]["ffn_in"]["weight"]["kernel"]
    assert kernel["codes"].dtype == np.int8
    assert "kernel" not in params["layer_0"]["ffn_in"]
    exact = qf.load(str(workdir))[1]["layer_0"]["ffn_in"]["kernel"]
    # Rounded to the nearest step, the largest weight to the last.
    error = np.abs(kernel["codes"].astype(np.float32) * kernel["scale"] - exact)
    assert np.all(error <= 0.5001 * kernel["scale"])
    assert np.abs(kernel["codes"]).max() == 127
    signature = json.loads((folder / "model.json").read_text())
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    assert signature["inputs"][0]["shape"][0] == signature["logits"]["shape"][0] == 3


def test_int8_model_is_evaluated_but_not_trained(bert, tmp_path):
    _, workdir, folder = bert
    rows = tmp_path / "rows.json"
    done = run("eval.py", f"--workdir={folder}", "--quant=none", f"--json={rows}")
    assert done.returncode == 0, done.stderr
    native = json.loads(rows.read_text())[0]["fp_loss"]
    done = run("eval.py", f"--workdir={workdir}", "--quant=none", f"--json={rows}")
    exact = json.loads(rows.read_text())[0]["fp_loss"]
    assert native != exact
    assert native == pytest.approx(exact, rel=0.05)
    assert_mistake(run("eval.py", f"--workdir={folder}"), "INT8 model already", "--quant=none")
    config = tiny_config(folder.parent, "bert", train__steps=20, checkpoint__every=10)
    with pytest.raises(UserError, match=r"exported INT8 model, which cannot be trained on"):
        train(config, str(folder))
    assert (folder / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--to=int4"],
            ["--to must be one of int8, huggingface, onnx, found 'int4'", "did you mean 'int8'"],
        ),
        (["--workdir="], ["--workdir is required"]),
        (["--workdir=nowhere"], ["nowhere does not exist"]),
        (["--out="], ["--out is required"]),
        (["--out=EXPORT"], ["--out=", "a new or an empty folder, found files in it: name another"]),
        (["--out=EXPORT/model.json"], ["a new or an empty folder, found a file"]),
        (["--workdir=EXPORT"], ["INT8 model already"]),
        (["--batch_size=0"], ["--batch_size must be at least 1, found 0"]),
        (["--calibration_seed=-1"], ["--calibration_seed must be at least 0, found -1"]),
        (["--quant=w8a8,w4a8"], ["must read like w8a8", "'w8a8,w4a8'"]),
        (["--quant=w8"], ["products of integers", "found none with --quant=w8: use w8a8"]),
        (["--quant=w8a16"], ["found none with --quant=w8a16"]),
        (["--config.quant.float_sites=.*"], ["found none with --quant=w8a8", "quant.float_sites"]),
        (["--config.quant.float_sites=layer_9"], ["'layer_9'", "matches none"]),
        (["--config.data.fils=x"], ["data.fils", "'files'"]),
    ],
)
def test_export_mistakes(bert, tmp_path, arguments, parts):
    _, workdir, folder = bert
    given = [argument.replace("EXPORT", str(folder)) for argument in arguments]
    done = run(
        "quantizable_flax.export", f"--workdir={workdir}", f"--out={tmp_path / 'new'}", *given
    )
    assert_mistake(done, *parts)
    assert not (tmp_path / "new").exists()


def test_a_flag_of_eval_exports_too(bert, tmp_path):
    _, workdir, folder = bert
    to = f"--export_int8={tmp_path / 'new'}"
    two = run("eval.py", f"--workdir={workdir}", to, "--quant=w8a8,w4a8")
    assert_mistake(two, "takes one --workdir and one --quant setting, found 1 and 2")
    none = run("eval.py", f"--workdir={workdir}", to, "--export_batch_size=0")
    assert_mistake(none, "--export_batch_size must be at least 1")
    full = run("eval.py", f"--workdir={workdir}", f"--export_int8={folder}")
    assert_mistake(full, "--export_int8=", "a new or an empty folder")
    done = run(
        "eval.py",
        f"--workdir={workdir}",
        to,
        "--config.quant.coverage=all",
        "--export_batch_size=3",
    )
    assert done.returncode == 0, done.stderr
    _, first_seed = evaluator_of(workdir).int8(parse_setting("w8a8"))
    loaded, other_seed = (qf.load(str(path))[1] for path in (tmp_path / "new", folder))
    jax.tree.map(np.testing.assert_array_equal, loaded, first_seed)
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), loaded, other_seed)
    assert not all(jax.tree.leaves(same))
