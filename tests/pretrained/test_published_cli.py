"""Published models through the command lines: classifiers, images, masked text, INT8."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import quantizable_flax as qf
from quantizable_flax.data.text.subword import BERT_TOKENS
from tests.pretrained import published
from tests.programs import assert_mistake, run

WORDS = [f"w{i}" for i in range(35)]
CLASSES = ("bad", "good", "neither")
COMMON = ("--calibration_seeds=1", "--config.eval.batch_size=16")
LENGTH = 10


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 8))) for _ in range(count)]


def text_folder(path, name: str, **values) -> str:
    """A model with its tokenizer, and texts with classes beside it."""
    config = published.config_json(name) | values
    published.write(path, config, published.weights(name))
    (path / "vocab.txt").write_text("\n".join([*BERT_TOKENS, *WORDS]))
    rng = np.random.default_rng(2)
    for split, count, seed in (("train", 60, 0), ("validation", 40, 1)):
        lines = [
            json.dumps({"text": text, "label": CLASSES[rng.integers(3)]})
            for text in texts(count, seed)
        ]
        (path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(path)


def of_text(path: str) -> list[str]:
    return [
        f"--workdir={path}",
        f"--config.data.files={path}/train.jsonl",
        f"--config.data.validation_files={path}/validation.jsonl",
        f"--config.data.cache_dir={path}/cache",
        f"--config.data.seq_len={LENGTH}",
        "--config.quant.calibration_batches=2",
    ]


def row_of(path, *arguments: str) -> dict:
    file = path / "rows.json"
    done = run("eval.py", *arguments, *COMMON, f"--json={file}")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())[0]


def rows_of_text(path: str):
    """Ids, mask and classes of the validation texts, made here."""
    number = {word: i for i, word in enumerate([*BERT_TOKENS, *WORDS])}
    lines = [json.loads(line) for line in Path(path, "validation.jsonl").read_text().splitlines()]
    ids = np.zeros((len(lines), LENGTH), np.int32)
    mask = np.zeros_like(ids)
    for row, line in enumerate(lines):
        tokens = ["[CLS]", *line["text"].split(), "[SEP]"]
        ids[row, : len(tokens)] = [number[token] for token in tokens]
        mask[row, : len(tokens)] = 1
    return ids, mask, np.array([CLASSES.index(line["label"]) for line in lines])


@pytest.mark.parametrize("family", ["Bert", pytest.param("DistilBert", marks=pytest.mark.slow)])
def test_a_classifier_on_labelled_text(family, tmp_path):
    name = f"{family}ForSequenceClassification"
    path = text_folder(tmp_path, name, id2label=dict(enumerate(CLASSES)))
    row = row_of(tmp_path, *of_text(path), "--config.data.label_key=label", "--quant=w8a8")
    model, params = qf.from_pretrained(path)
    ids, mask, classes = rows_of_text(path)
    logits = model.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    accuracy = 100.0 * np.mean(np.argmax(logits, axis=1) == classes)
    assert row["metric"] == "top1"
    np.testing.assert_allclose(row["fp"], accuracy, rtol=1e-6)
    assert abs(row["w8a8"] - row["fp"]) <= 10.0  # 4 of 40 texts


def test_a_classifier_without_labels_is_judged_by_its_fidelity(tmp_path):
    path = text_folder(tmp_path, "BertForSequenceClassification")
    row = row_of(tmp_path, *of_text(path), "--quant=w8a8")
    assert row["metric"] == "fidelity"
    assert 0.9 < row["w8a8"] < row["fp"]


def test_classes_that_the_model_does_not_know_are_named(tmp_path):
    labels = dict(enumerate(("bad", "good", "other")))
    path = text_folder(tmp_path, "BertForSequenceClassification", id2label=labels)
    done = run("eval.py", *of_text(path), "--config.data.label_key=label", "--quant=none")
    assert_mistake(done, "neither", "train.jsonl" if "train.jsonl" in done.stderr else "validation")


def test_masked_text_has_a_perplexity(tmp_path):
    path = text_folder(tmp_path, "BertForMaskedLM")
    row = row_of(tmp_path, *of_text(path), "--quant=w8a8")
    assert row["metric"] == "perplexity"
    assert row["fp"] > 1.0
    np.testing.assert_allclose(row["w8a8"], row["fp"], rtol=0.2)


def test_a_model_without_a_tokenizer_takes_the_one_that_is_named(tmp_path):
    path = text_folder(tmp_path, "BertModel")
    (tmp_path / "vocab.txt").rename(tmp_path / "words.txt")
    assert_mistake(run("eval.py", *of_text(path)), "expected a tokenizer", "data.tokenizer.file")
    named = f"--config.data.tokenizer.file={path}/words.txt"
    assert row_of(tmp_path, *of_text(path), named, "--quant=none")["fp"] > 0.999


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        pytest.param("ViTForImageClassification", "top1", marks=pytest.mark.slow),
        pytest.param("ViTModel", "fidelity", marks=pytest.mark.slow),
        ("DeiTForImageClassificationWithTeacher", "top1"),
    ],
)
def test_images(name, metric, tmp_path):
    path = published.saved(tmp_path / "model", name)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("validation", 8)):
        for number in range(3 * count):
            folder = tmp_path / split / CLASSES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = [
        f"--workdir={path}",
        f"--config.data.files={tmp_path}/train",
        f"--config.data.validation_files={tmp_path}/validation",
        "--config.quant.calibration_batches=2",
        "--quant=w8a8",
    ]
    row = row_of(tmp_path, *arguments)
    assert row["metric"] == metric
    if metric == "fidelity":
        assert 0.9 < row["w8a8"] < row["fp"]
        return
    model, params = qf.from_pretrained(path)
    files = sorted((tmp_path / "validation").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    predicted = np.argmax(model.apply({"params": params}, jnp.asarray(pixels)), axis=1)
    known = np.array([CLASSES.index(file.parent.name) for file in files])
    np.testing.assert_allclose(row["fp"], 100.0 * np.mean(predicted == known), rtol=1e-6)


def test_an_encoder_becomes_integers(tmp_path):
    path = text_folder(tmp_path / "model", "BertModel")
    out = tmp_path / "int8"
    done = run("quantizable_flax.export", *of_text(path), f"--out={out}", "--batch_size=4")
    assert done.returncode == 0, done.stderr
    model, params = qf.load(str(out))
    ids, mask, _ = rows_of_text(path)
    integers = model.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    exact_model, exact = qf.load(path)
    floats = exact_model.apply({"params": exact}, jnp.asarray(ids), jnp.asarray(mask))
    visible = mask.astype(bool)
    error = np.linalg.norm((integers - floats)[visible]) / np.linalg.norm(floats[visible])
    assert 0.0 < error < 0.15
