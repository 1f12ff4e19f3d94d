"""Texts with classes in every form that sources have them, and configurations that ask for them."""

import json

import datasets
import numpy as np
import tensorflow_datasets as tfds

from .conftest import random_documents
from .tfds_builders import build

NAMES = ["neutral", "bad", "good"]  # in an order of their own
TEXTS = random_documents(120, seed=7)
NUMBERS = [len(text) % 3 for text in TEXTS]
NAMED = [NAMES[number] for number in NUMBERS]


def write_jsonl(path, texts, labels, key="label"):
    rows = ({"text": text, key: label} for text, label in zip(texts, labels, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(labels, feature=None):
    found = datasets.Dataset.from_dict({"text": TEXTS, "label": labels})
    return found if feature is None else found.cast_column("label", feature)


def build_tfds(path, *kinds):
    """Builds datasets of TEXTS, named by how they tell the classes, and returns their folder."""
    features = {
        "declared": (tfds.features.ClassLabel(names=NAMES), NUMBERS),
        "counted": (tfds.features.ClassLabel(num_classes=3), NUMBERS),
        "named": (tfds.features.Text(), NAMED),
        "numbered": (tfds.features.Scalar(np.int64), NUMBERS),
        "measured": (tfds.features.Scalar(np.float32), NUMBERS),
    }
    for kind in kinds:
        feature, labels = features[kind]
        rows = [{"text": text, "label": x} for text, x in zip(TEXTS, labels, strict=True)]
        described = {"text": tfds.features.Text(), "label": feature}
        build(str(path), kind, {"train": rows}, features=described)
    return str(path)
