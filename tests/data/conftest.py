"""Small texts, configurations and tokenizers; nothing is written outside tmp_path."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from quantizable_flax.config.defaults import data_defaults, model_defaults
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text import subword
from quantizable_flax.data.text.tokenizer import Tokenizer

from .heads import SEQ_LEN, with_head

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "quantized", "heads"]


def random_documents(count: int, seed: int = 0) -> list[str]:
    """Returns documents of 1 to 39 words, all different."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, count)
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    return [f"{text} {number}" for number, text in enumerate(texts)]


@pytest.fixture(autouse=True)
def _no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_wordpiece(random_documents(300), vocab_size=200, lowercase=True)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train_byte_bpe(random_documents(300), vocab_size=300)


@pytest.fixture(scope="session")
def roberta_tokenizer(byte_tokenizer) -> Tokenizer:
    """<s>, <pad>, </s> and <unk> are 0 to 3 and <mask> is the last token, as in RoBERTa."""
    model = json.loads(byte_tokenizer.to_json())["model"]
    vocab = {**model["vocab"], "<mask>": len(model["vocab"])}
    return Tokenizer(subword.byte_bpe(vocab, [tuple(merge) for merge in model["merges"]]))


@pytest.fixture
def documents() -> list[str]:
    return random_documents(200)


@pytest.fixture
def make_config(tmp_path):
    """Returns a function that makes a config of a family; keywords override config.data."""

    def make(family: str = "bert", **overrides) -> ConfigDict:
        config = ConfigDict({"model": model_defaults(family), "data": data_defaults(family)})
        small = {"seq_len": 16, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        config.data.update({**small, **overrides})
        config.data.tokenizer.vocab_size = 200 if family == "bert" else 300
        return config

    return make


@pytest.fixture
def text_config(tmp_path, make_config, documents):
    """Returns make_config with `documents` as the training and validation text."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))

    def make(family: str = "bert", **overrides) -> ConfigDict:
        return make_config(family, **{"files": str(path), **overrides})

    return make


@pytest.fixture
def make_text_task(tokenizer, byte_tokenizer):
    """Returns the function from a config to its task with the tokenizer of these tests."""

    def make(config: ConfigDict):
        chosen = tokenizer if config.model.name == "bert" else byte_tokenizer
        return make_task(config, {"tokenizer": json.loads(chosen.to_json())})

    return make


@pytest.fixture
def labelled_config(make_config):
    """Returns make_config of a classifier of 3 classes, whose data have them under `label`."""

    def make(num_classes=3, **overrides):
        config = make_config(**{"label_key": "label", "seq_len": SEQ_LEN, **overrides})
        return with_head(config, "classifier", num_classes)

    return make


@pytest.fixture
def make_task_of(labelled_config, tokenizer):
    """Returns the function from keywords of labelled_config, and the names of a checkpoint."""

    def make(num_classes=3, classes=None, **overrides):
        assets = {"tokenizer": json.loads(tokenizer.to_json())}
        names = {} if classes is None else {"classes": classes}
        return make_task(labelled_config(num_classes, **overrides), assets | names)

    return make
