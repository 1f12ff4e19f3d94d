"""A trained run as a folder of transformers, by the command line."""

import json

import jax
import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.pretrained.folder import read_folder
from quantizable_flax.quantization.learned import is_grid, without_grids
from quantizable_flax.training.loop import train
from tests.programs import assert_mistake, run
from tests.tiny import tiny_config

SHORT = {"train__steps": 4, "checkpoint__every": 4}
CHANGES = {
    "bert": {"model__attention__gate": "linear", "model__pad_token_id": 0},
    "opt": {
        "quant__train": True,
        "quant__train_ranges": "learned",
        "model__attention__softmax": "clipped",
        "model__attention__alpha": 2.0,
    },
    "vit": {"data__eval_crop": 0.8},
}


@pytest.fixture(scope="module", params=CHANGES)
def exported(request, tmp_path_factory):
    """(workdir, folder that was written, what the command line printed)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(folder, request.param, **SHORT, **CHANGES[request.param])
    train(config, str(folder / "run"))
    done = run(
        "quantizable_flax.export",
        f"--workdir={folder / 'run'}",
        "--to=huggingface",
        f"--out={folder / 'out'}",
        *(["--config.data.eval_crop=0.5"] if request.param == "vit" else []),
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "out", done


def test_the_folder_has_the_run(exported):
    workdir, folder, done = exported
    trained, written = load_run(str(workdir)), read_folder(str(folder))
    params = without_grids(trained.params)
    assert jax.tree.structure(written.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, written.params, params)
    assert written.assets == trained.assets
    assert written.assets
    assert written.model.config.softmax == trained.model.config.softmax
    assert written.model.config.gate == trained.model.config.gate
    assert done.stdout.startswith(f"Wrote {folder}: config.json, model.safetensors, ")
    vanilla = trained.config.model.name == "vit"
    assert ("vanilla attention" in done.stderr) == (not vanilla)
    if vanilla:
        assert written.config.data.eval_crop == 0.5
        assert written.config.model.pixel_mean == tuple(trained.config.model.pixel_mean)


def test_learned_grids_are_left_out(exported):
    workdir, folder, done = exported
    params = qf.load(str(workdir))[1]
    grids = [p for p, _ in jax.tree.leaves_with_path(params) if is_grid(tuple(k.key for k in p))]
    assert bool(grids) == ("without the grids of quant.train_setting" in done.stderr)
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    assert bool(grids) <= bool(tied)  # it is the OPT


@pytest.mark.parametrize("exported", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--quant=w8a8"], ["--quant is of another target, found it with --to=huggingface"]),
        (["--batch_size=8"], ["--batch_size is of another target"]),
        (["--config.quant.coverage=all"], ["--config.quant.coverage is of another target"]),
        (["--config.data.eval_crop=x"], ["eval_crop"]),
        (["--out=FOLDER"], ["a new or an empty folder, found files in it"]),
        (["--to=hugingface"], ["one of int8, huggingface", "did you mean 'huggingface'"]),
    ],
)
def test_mistakes(exported, tmp_path, arguments, parts):
    workdir, folder, _ = exported
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    shared = [f"--workdir={workdir}", "--to=huggingface", f"--out={tmp_path / 'new'}"]
    assert_mistake(run("quantizable_flax.export", *shared, *given), *parts)
    assert not (tmp_path / "new").exists()
