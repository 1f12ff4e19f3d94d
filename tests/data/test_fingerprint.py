"""Training data are told by what they hold, not by where they lie."""

import json
import shutil

import pytest

from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.images.task import ImageTask

from .conftest import random_documents
from .images.conftest import make_config as image_config
from .images.conftest import pngs, write_folder, write_tar


def differ(first, second):
    saved = json.loads(json.dumps(first.fingerprint))
    return difference(saved, second.fingerprint, first.unit)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_text(text_config, make_text_task, documents, tmp_path, family):
    first = make_text_task(text_config(family))
    moved = shutil.copy(tmp_path / "text.txt", tmp_path / "moved.txt")
    (tmp_path / "file").write_text("in the way")
    in_memory = {"cache_dir": str(tmp_path / "file" / "below")}
    for overrides in ({"files": str(moved)}, {"source": "files"}, in_memory):
        assert differ(first, make_text_task(text_config(family, **overrides))) is None
    count = first.fingerprint["examples"]
    (tmp_path / "moved.txt").write_text("\n\n".join(documents[::-1]))
    found, _ = differ(first, make_text_task(text_config(family, files=str(moved))))
    assert found == f"{count} sequences where the data now have others, or another order of them"
    (tmp_path / "moved.txt").write_text("\n\n".join(documents[:100]))
    found, _ = differ(first, make_text_task(text_config(family, files=str(moved))))
    assert found.startswith(f"{count} sequences where the data now have ")


def test_weights_count(text_config, make_text_task):
    sources = ("files*0.5,files*0.5", "files*0.4,files*0.6")
    tasks = [make_text_task(text_config(source=source)) for source in sources]
    assert differ(tasks[0], tasks[0]) is None
    assert differ(*tasks)


def test_the_embedded_corpus_of_another_python(make_config, make_text_task, monkeypatch, tmp_path):
    def fingerprint(python, texts):
        config = make_config(cache_dir=str(tmp_path / python))
        with monkeypatch.context() as patch:
            patch.setattr("platform.python_version", lambda: python)
            patch.setattr("quantizable_flax.data.text.documents.embedded_documents", lambda: texts)
            return make_text_task(config).fingerprint

    texts = random_documents(200)
    began = fingerprint("3.11.1", texts)
    assert difference(began, fingerprint("3.12.3", texts), "sequences") is None
    found = difference(began, fingerprint("3.12.4", texts[10:]), "sequences")
    assert found == (
        "the embedded corpus of Python 3.11.1, which is another in this Python 3.12.4",
        "continue it under Python 3.11.1",
    )


def test_images(tmp_path):
    files = pngs(count=20)

    def task(path, **overrides):
        return ImageTask(image_config(8, files=str(path), num_classes=2, **overrides))

    first = task(write_folder(tmp_path / "a", files))
    assert differ(first, task(str(tmp_path / "a") + "/")) is None
    prefixed = {f"train/{name}": content for name, content in files.items()}
    assert differ(first, task(write_tar(tmp_path / "b.tar", prefixed))) is None
    others = pngs(count=20, first=500)
    one = {**files, "cat/3.png": files["cat/4.png"]}
    renamed = {name.replace("/3", "/x"): content for name, content in files.items()}
    fewer = {name: content for name, content in files.items() if name != "cat/3.png"}
    for number, changed in enumerate((others, one, renamed, fewer)):
        assert differ(first, task(write_folder(tmp_path / f"{number}", changed)))


def test_a_corrupt_image_may_be_replaced_by_any_other(tmp_path):
    files = pngs(count=20)
    corrupt = {**files, "cat/3.png": files["cat/3.png"][:50]}

    def task(name, content):
        folder = write_folder(tmp_path / name, content)
        return ImageTask(image_config(8, files=str(folder), num_classes=2))

    began = task("began", corrupt)
    replaced = task("replaced", {**files, "cat/3.png": files["cat/4.png"]})
    assert differ(began, replaced) is None
    assert differ(replaced, began) is None  # training names it, and says what to do


def test_digits():
    config = image_config(8, num_classes=10, channels=1)
    assert differ(ImageTask(config), ImageTask(config)) is None
