"""Runs of a few seconds, for the tests of training, evaluation and commands."""

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


SHARED = {
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.intermediate_size": 32,
    "model.initializer_range": 0.02,
    "optimizer.warmup_steps": 10,
    "optimizer.learning_rate": 3e-3,
    # As the defaults, for recipes that say otherwise.
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup_from": 0.0,
    "optimizer.decay_to": 0.0,
    "train.steps": 80,
    "train.batch_size": 8,
    "train.log_every": 20,
    "train.eval_every": 0,
    "eval.batch_size": 8,
    "checkpoint.every": 40,
    "quant.calibration_batches": 2,
    "quant.calibration_batch_size": 8,
}


def overrides(tmp_path, family: str = "bert") -> dict:
    """Keys of a one-layer model of width 16: on the text of `write_text`, or on the digits."""
    if family == "vit":
        return {
            **SHARED,
            "model.image_size": 8,
            "model.patch_size": 4,
            "model.channels": 1,
            "model.num_classes": 10,
            "model.pixel_mean": (0.3,),
            "model.pixel_std": (0.4,),
            "model.label_smoothing": 0.1,
            "model.mixup_alpha": 0.2,
            "model.cutmix_alpha": 1.0,
            "data.validation_fraction": 0.02,
            "data.augment.crop_scale": 0.5,
            "data.augment.pad_crop": 1,
            "data.augment.flip": True,
            "data.augment.rand_layers": 2,
            "data.augment.rand_magnitude_std": 0.5,
            "data.augment.color_jitter": 0.4,
            "optimizer.schedule": "cosine",
        }
    text = {
        **SHARED,
        "model.max_position_embeddings": 16,
        "data.files": str(tmp_path / "text.txt"),
        "data.seq_len": 16,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    if family == "opt":
        return text | {
            "model.vocab_size": 300,
            "model.pad_token_id": 1,
            "data.tokenizer.vocab_size": 300,
        }
    return text | {
        "model.vocab_size": 160,
        "model.max_predictions": 8,
        "data.tokenizer.vocab_size": 160,
    }


def _values(tmp_path, family: str, changes: dict) -> dict:
    if not (tmp_path / "text.txt").exists():
        write_text(tmp_path / "text.txt")
    renamed = {key.replace("__", "."): value for key, value in changes.items()}
    return {**overrides(tmp_path, family), **renamed}


def tiny_config(tmp_path, family: str = "bert", **changes):
    """A whole configuration; changes are written with `__` for a dot."""
    config = default_config(family)
    for path, value in _values(tmp_path, family, changes).items():
        *groups, key = path.split(".")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


def flags(tmp_path, family: str = "bert", **changes) -> list[str]:
    """The same as command-line overrides."""
    return [
        f"--config.{path}={value}" for path, value in _values(tmp_path, family, changes).items()
    ]
