"""A run of a few seconds on a made-up text, for the tests of training, evaluation and commands."""

import numpy as np

from quantizable_flax.config import default_config

TEXT = "the quick brown fox jumps over a lazy dog while quantized heads attend to nothing"
WORDS = TEXT.split()


def write_text(path, documents: int = 400, seed: int = 0) -> str:
    """Writes documents separated by blank lines and returns the path."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 40))) for _ in range(documents)]
    path.write_text("\n\n".join(f"{text} {i}" for i, text in enumerate(texts)))
    return str(path)


def overrides(tmp_path) -> dict:
    """Keys of a two-layer model of width 16 on the text of `write_text`."""
    return {
        "model.vocab_size": 160,
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.intermediate_size": 32,
        "model.max_position_embeddings": 16,
        "model.max_predictions": 8,
        "model.initializer_range": 0.02,
        "data.files": str(tmp_path / "text.txt"),
        "data.seq_len": 16,
        "data.cache_dir": str(tmp_path / "cache"),
        "data.tokenizer.vocab_size": 160,
        "optimizer.warmup_steps": 10,
        "optimizer.learning_rate": 3e-3,
        "train.steps": 80,
        "train.batch_size": 8,
        "train.log_every": 20,
        "train.eval_every": 0,
        "eval.batch_size": 8,
        "checkpoint.every": 40,
        "quant.calibration_batches": 2,
        "quant.calibration_batch_size": 8,
    }


def tiny_config(tmp_path, **changes):
    """A whole configuration; changes are written with `__` for a dot."""
    if not (tmp_path / "text.txt").exists():
        write_text(tmp_path / "text.txt")
    config = default_config()
    values = {
        **overrides(tmp_path),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    for path, value in values.items():
        *groups, key = path.split(".")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


def flags(tmp_path, **changes) -> list[str]:
    """The same as command-line overrides."""
    if not (tmp_path / "text.txt").exists():
        write_text(tmp_path / "text.txt")
    values = {
        **overrides(tmp_path),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"--config.{path}={value}" for path, value in values.items()]
