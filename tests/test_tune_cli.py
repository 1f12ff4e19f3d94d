"""The command line of configs/tune.py: published folders and runs of ours, named in either way."""

import json
import re
import subprocess
import sys

import pytest

from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.cli import recipes
from quantizable_flax.errors import UserError
from quantizable_flax.training.loop import train
from tests.programs import ROOT, assert_mistake, run
from tests.tiny import tiny_config
from tests.training.tunable import model_folder

SHORT = (
    "--config.train.steps=4",
    "--config.train.log_every=2",
    "--config.train.eval_every=4",
    "--config.eval.batch_size=4",
    "--config.data.validation_fraction=0.2",
)
NAMES = ("BertModel", "OPTForCausalLM", "ViTForImageClassification")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(published folder, data for it) by architecture."""
    return {name: model_folder(tmp_path_factory.mktemp(name) / "model", name) for name in NAMES}


def lines(workdir, group: str) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["group"] == group]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param("BertModel", "gated", marks=pytest.mark.slow),
        ("OPTForCausalLM", "plain"),
        ("ViTForImageClassification", "clipped"),
    ],
)
def test_a_published_folder_is_tuned(models, name, variant, tmp_path):
    model, data = models[name]
    own = (
        "--config.data.augment.flip=True" if name.startswith("ViT") else "--config.data.seq_len=12"
    )
    done = run(
        "train.py",
        f"--config=configs/tune.py:{variant}",
        f"--config.init_from={model}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.files={data}",
        own,
        *SHORT,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"validation cosine (1\.0000|0\.9\d\d\d)", done.stderr)
    training = lines(tmp_path / "run", "train")[-1]
    assert ("logits" in training) == (name != "BertModel")
    found = load_run(str(tmp_path / "run"))
    assert found.config.distill.teacher == model
    assert ("tokenizer" in found.assets) == (not name.startswith("ViT"))
    assert (found.config.model.attention.gate == "linear") == (variant == "gated")


@pytest.mark.slow
def test_a_run_of_ours_by_the_bare_name_of_the_recipe(tmp_path):
    config = tiny_config(tmp_path, train__steps=4, model__max_predictions=0)
    train(config, str(tmp_path / "first"))
    done = run(
        "train.py",
        f"--config=tune:plain,{tmp_path / 'first'}",
        f"--workdir={tmp_path / 'run'}",
        *SHORT,
    )
    assert done.returncode == 0, done.stderr
    again = run(
        "train.py",
        f"--config=tune:plain,{tmp_path / 'first'}",
        f"--workdir={tmp_path / 'run'}",
        *SHORT,
    )
    assert "already at step 4" in again.stderr
    (tmp_path / "first").rename(tmp_path / "gone")
    moved = run(
        "train.py",
        f"--config=tune:plain,{tmp_path / 'gone'}",
        f"--config.distill.teacher={tmp_path / 'first'}",
        f"--workdir={tmp_path / 'run'}",
        *SHORT,
    )
    assert_mistake(moved, f"distill.teacher={tmp_path / 'first'}", "does not exist")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config=configs/tune.py:plain"], ["takes a finished model", "--config.init_from=PATH"]),
        (["--config=configs/tune.py"], ["takes a finished model"]),
        (["--config=configs/tune.py:palin", "--config.init_from=MODEL"], ["did you mean 'plain'"]),
        (["--config=tune:plain", "--config.init_from=/nowhere"], ["/nowhere does not exist"]),
        (["--config=tune:plain", "--config.init_from=configs"], ["no finished checkpoint"]),
        (["--config=tune:plain,a", "--config.init_from=MODEL"], ["name it once"]),
        (
            ["--config=tune:plain", "--config.init_from=MODEL", "--config.data.eval_crop=0.5"],
            ["unknown configuration key data.eval_crop"],
        ),
        (
            ["--config=tune:plain", "--config.init_from=MODEL", "--config.distill.teacher=None"],
            ["has no loss of its own"],
        ),
        (
            ["--config=quickstart", "--config.init_from=MODEL"],
            ["init_from=", 'model.head="pooler", not "masked_lm"'],
        ),
    ],
)
def test_mistakes(models, tmp_path, arguments, parts):
    given = [argument.replace("MODEL", models["BertModel"][0]) for argument in arguments]
    assert_mistake(run("train.py", *given, f"--workdir={tmp_path / 'run'}"), *parts)
    assert not (tmp_path / "run").exists()


def test_a_published_text_model_without_a_tokenizer(models, tmp_path):
    folder = tmp_path / "model"
    model, data = model_folder(folder, "BertModel")
    (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    arguments = [
        "--config=tune:plain",
        f"--config.init_from={model}",
        f"--config.data.files={data}",
    ]
    workdir = f"--workdir={tmp_path / 'run'}"
    assert_mistake(run("train.py", *arguments, workdir), "no tokenizer", "data.tokenizer.file")
    file = f"--config.data.tokenizer.file={tmp_path / 'kept.json'}"
    done = run("train.py", *arguments, file, workdir, *SHORT)
    assert done.returncode == 0, done.stderr


def test_the_model_is_handed_to_recipes_that_take_one():
    tune, other = (str(recipes.folder() / f"{name}.py") for name in ("tune", "quickstart"))
    model = "--config.init_from=hf:org/name"
    handed = f"--config={tune}:gated,hf:org/name"
    assert recipes.with_paths(["train.py", "--config=tune:gated", model])[1] == handed
    assert recipes.with_paths([model, f"--config={tune}:gated,hf:org/name"])[1] == handed
    apart = ["--config", "tune:gated", "--config.init_from", "hf:org/name"]
    assert recipes.with_paths(apart)[1] == f"{tune}:gated,hf:org/name"
    assert recipes.with_paths([f"--config={tune}", model])[0] == f"--config={tune}:,hf:org/name"
    assert recipes.with_paths(["--config=quickstart:gated", model])[0] == f"--config={other}:gated"
    assert recipes.with_paths(["--config=tune:gated"])[0] == f"--config={tune}:gated"
    with pytest.raises(UserError, match="name it once"):
        recipes.with_paths(["--config=tune:plain,elsewhere", model])


def test_a_recipe_reads_no_device(models, tmp_path):
    """Hosts meet before the first device is asked for, and recipes are read before that."""
    train(tiny_config(tmp_path, train__steps=2), str(tmp_path / "run"))
    code = (
        "import sys; from jax._src import xla_bridge; from configs.tune import get_config;"
        "[get_config('plain,' + path) for path in sys.argv[1:]];"
        "sys.exit(xla_bridge.backends_are_initialized())"
    )
    paths = [models["BertModel"][0], str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
