"""Small texts, configurations and tokenizers; nothing is written outside tmp_path."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from quantizable_flax.data import Tokenizer

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


@pytest.fixture
def documents() -> list[str]:
    return random_documents(200)


@pytest.fixture
def make_config(tmp_path):
    """Returns a function that makes a whole config; keywords override fields of config.data."""

    def make(seed: int = 0, **overrides) -> ConfigDict:
        data = {
            "source": "auto",
            "files": None,
            "validation_files": None,
            "text_key": "text",
            "seq_len": 16,
            "validation_fraction": 0.2,
            "mask_rate": 0.15,
            "cache_dir": str(tmp_path / "cache"),
            "tokenizer": {"file": None, "vocab_size": 200, "lowercase": True},
        }
        return ConfigDict({"seed": seed, "data": {**data, **overrides}})

    return make


@pytest.fixture
def text_config(tmp_path, make_config, documents):
    """Returns make_config with `documents` as the training and validation text."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))

    def make(seed: int = 0, **overrides) -> ConfigDict:
        return make_config(seed, **{"files": str(path), **overrides})

    return make
