"""Models by their names on the hub: what is fetched, and a sentence for whatever goes wrong."""

import fnmatch
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.hub import resolve

ROOT = Path(__file__).parents[2]
FILES = {
    "safetensors": ["model.safetensors"],
    "shards": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "bin": ["pytorch_model.bin"],
}
WANTED = [
    "config.json",
    "config_sentence_transformers.json",
    "merges.txt",
    "model.safetensors.index.json",
    "modules.json",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "vocab.txt",
    "1_Pooling/config.json",
]
UNWANTED = [
    "flax_model.msgpack",
    "onnx/config.json",
    "onnx/model.onnx",
    "onnx/model.safetensors",
    "openvino/openvino_model.bin",
    "rust_model.ot",
    "tf_model.h5",
    "training_args.bin",
    "checkpoint-10/config.json",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts a repository in place of the hub, and the calls to that."""
    calls = []

    def of(files):
        def fetch(name, *, revision, allow_patterns, ignore_patterns):
            calls.append((name, revision))
            for file in files:
                path = tmp_path / "cache" / file
                path.parent.mkdir(exist_ok=True, parents=True)
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns) and not any(
                    fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns
                ):
                    path.touch()
            return str(tmp_path / "cache")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        return calls

    return of


def fetched(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("weights", FILES)
def test_what_a_model_needs_is_fetched_and_its_weights_once(weights, hub):
    hub([*WANTED, *UNWANTED, *FILES["bin"], *FILES[weights]])
    assert fetched(resolve("org/name")) == {*WANTED, *FILES[weights]}


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("org/name", ("org/name", None)),
        ("name", ("name", None)),
        ("org/na.me-1_2@v1.0", ("org/na.me-1_2", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
    ],
)
def test_names_and_revisions(given, called, hub):
    calls = hub(FILES["safetensors"])
    assert resolve(given).is_dir()
    assert calls == [called]


def test_what_is_there_is_taken_before_the_hub(tmp_path, monkeypatch, hub):
    calls = hub([])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    (tmp_path / "model.bin").touch()
    assert resolve("org/name@v1").samefile(tmp_path / "org" / "name@v1")
    assert resolve("~/org") == tmp_path / "org"
    assert resolve(str(tmp_path / "model.bin")) == tmp_path / "model.bin"
    assert not calls


@pytest.mark.parametrize(
    "name",
    [
        *("", "./runs", "../runs", "/runs", "~/runs", "~nobody/runs", "a/b/c", "a b", "a\\b"),
        *("über", "a\0b", "https://hub/org/name", "org/model.safetensors", "x" * 5000 + "//"),
    ],
)
def test_what_is_no_name_is_not_asked_for(name, hub, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # where none of these is by chance
    calls = hub([])
    with pytest.raises(UserError, match="expected a folder, a file or the name of a model"):
        resolve(name)
    assert not calls


def answer(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("first line\nsecond line", response=response)


ANSWERS = {
    "gated; accept its terms on its page there and run: hf auth login": lambda: answer(
        errors.GatedRepoError, 403
    ),
    "in neither; correct the path or the name, or, where it is private": lambda: answer(
        errors.RepositoryNotFoundError, 404
    ),
    "found the model without that revision; name one": lambda: answer(
        errors.RevisionNotFoundError, 404
    ),
    r"found none \(first line\); correct": lambda: errors.LocalEntryNotFoundError("first line\nx"),
    r"found none \(off\); correct": lambda: errors.OfflineModeIsEnabled("off"),
    r"found none \(reset\); correct": lambda: ConnectionResetError(104, "reset"),
    r"found HfHubHTTPError \(first line\); try again later": lambda: answer(
        errors.HfHubHTTPError, 503
    ),
    r"found OSError \(No space left\); try": lambda: OSError(28, "No space left"),
    r"found TimeoutError \(TimeoutError\); try": TimeoutError,
}


@pytest.mark.parametrize("sentence", ANSWERS)
def test_answers_of_the_hub_become_one_sentence(sentence, monkeypatch):
    def refuse(*_, **__):
        raise ANSWERS[sentence]()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=rf"^expected the model org/name@v1 .*{sentence}") as caught:
        resolve("org/name@v1")
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_without_a_network_what_is_in_the_cache_may_do(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise errors.IncompleteSnapshotError("README.txt is missing", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert resolve("org/name") == tmp_path


def test_the_library_itself_without_a_network(tmp_path):
    program = (
        "from quantizable_flax.pretrained.hub import resolve\n"
        "from quantizable_flax.errors import UserError\n"
        "for name in ('org/name', 'gpt2@main', 'org/a..b'):\n"
        "    try:\n"
        "        resolve(name)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("expected the model org/name in a folder, in the cache of the Hugging")
    assert second.startswith("expected the model gpt2@main in a folder, in the cache")
    assert third.startswith("expected the model org/a..b in a folder or on the Hugging Face hub")


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'quantizable_flax\[interop\]', or name a"):
        resolve("org/name")
