"""Every configuration key with its default and meaning: shared ones, and those of each family.

docs/configuration.md is made of this (`make docs`). What a model, its attention or a quantization
scheme is made of is said once, by the dataclass (or the function's arguments) that takes it.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from quantizable_flax.config.keys import Key, Keys, derived, meaning, to_config
from quantizable_flax.models import build
from quantizable_flax.models.transformer import TransformerConfig
from quantizable_flax.nn.gate import GateConfig
from quantizable_flax.nn.softmax_config import make_softmax
from quantizable_flax.quantization.spec import BIT_FIELDS, QuantSpec

FAMILIES = build.FAMILIES
# Fields of a model that are keys of `config.train`.
OF_TRAINING = ("remat", "loss_chunk", "attention_kernel")
OF_ATTENTION = ("qk_norm",)  # of `config.model.attention`
# Fields of a model and of a scheme that other keys say, and arguments that follow from the model.
NOT_OF_MODEL = (*OF_TRAINING, *OF_ATTENTION, "dtype", "softmax", "gate", "quant")
NOT_OF_QUANT = (*BIT_FIELDS, "head", "site_bits", "backend")
NOT_OF_SOFTMAX = ("kind", "seq_len", "causal")


def family_keys(family: str) -> Keys:
    """Every key of a configuration of the family."""
    return {**shared_keys(), "model": model_keys(family), "data": data_keys(family)}


def model_defaults(family: str) -> ConfigDict:
    """`config.model` by default."""
    return to_config(model_keys(family))


def data_defaults(family: str) -> ConfigDict:
    """`config.data` by default."""
    return to_config(data_keys(family))


def _names(owner: Callable[..., Any], without: Iterable[str]) -> list[str]:
    return [name for name in inspect.signature(owner).parameters if name not in without]


def shared_keys() -> Keys:
    """Keys that every family has."""
    return {
        "name": Key(None, "a row's name in tables, None for that of the workdir", str),
        "init_from": Key(
            None,
            "what a new run starts from: another run, a published model's folder or hf:org/name",
            str,
        ),
        "seed": Key(0, "of initialization, order of the data, masks, augmentation and dropout"),
        "optimizer": {
            "name": Key(
                "adamw", '"adamw", or "muon" for the matrices in the layers and AdamW for the rest'
            ),
            "learning_rate": Key(1e-4, "peak of the schedule"),
            "schedule": Key("linear", 'how it decays behind the warm-up: "linear" or "cosine"'),
            "warmup_steps": Key(100, "steps of the linear rise to the peak"),
            "warmup_from": Key(0.0, "learning rate of the first step"),
            "decay_to": Key(0.0, "learning rate after the last step"),
            "decay_steps": Key(0, "length of the schedule, 0 for train.steps"),
            "b1": Key(0.9, "AdamW's decay of the mean gradient, in [0, 1)"),
            "b2": Key(0.999, "AdamW's decay of the mean squared gradient, in [0, 1)"),
            "eps": Key(1e-8, "added to AdamW's divisor"),
            "weight_decay": Key(0.01, "of AdamW, for all but biases, LayerNorms and tables of ViT"),
            "decay_layer_norm": Key(False, "also decay the scales of LayerNorms"),
            "frozen": Key(
                None, "parameters that stay as they are, a regular expression of full paths", str
            ),
            "clip_norm": Key(1.0, "the largest global norm of a gradient, 0 for no clipping"),
            "muon_learning_rate": Key(None, "its peak, None for learning_rate", float),
            "muon_momentum": Key(0.95, "Muon's decay of the mean gradient, in [0, 1)"),
            "muon_parameters": Key(
                r"layer_\d+/(attention/(query|key|value|output)|ffn_in|ffn_out)/kernel",
                "the matrices that Muon moves, a regular expression of full paths",
            ),
        },
        "train": {
            "steps": Key(1000, "steps of the optimizer in the whole run, at least 1"),
            "batch_size": Key(32, "examples of a step, over all devices"),
            "grad_accum_steps": Key(
                1, "micro-batches whose gradients make a step; divides the batch"
            ),
            **derived(TransformerConfig, OF_TRAINING),
            "dropout_bits": Key(
                "auto",
                'what dropout draws from: "threefry", the same on any mesh; "rbg", the '
                'accelerator\'s generator, cheaper; "auto": rbg but on CPUs',
            ),
            "prefetch": Key(2, "batches on the devices ahead of the step"),
            "log_every": Key(50, "steps between two lines of training metrics, at least 1"),
            "eval_every": Key(500, "steps between two validations, 0 for none"),
            "eval_batches": Key(8, "batches of such a validation, 0 for the whole split"),
            "telemetry_every": Key(0, "steps between two logs of outliers and gates, 0 for none"),
        },
        "checkpoint": {
            "every": Key(500, "steps between two checkpoints, at least 1"),
            "keep": Key(2, "the last so many stay, at least 1"),
            "keep_every": Key(
                0, "so do multiples of this, itself one of checkpoint.every; 0: none"
            ),
        },
        "mesh": {
            "data": Key(-1, "parts of the batch; of these four, one may be -1: all other devices"),
            "fsdp": Key(1, "parts of the batch, the parameters and the optimizer's state"),
            "sequence": Key(1, "parts of the tokens of each sequence"),
            "tensor": Key(1, "parts of heads, feed-forward layers and vocabulary"),
        },
        "eval": {
            "batch_size": Key(32, "examples of a batch, in validation too"),
            "batches": Key(0, "batches to evaluate on, 0 for the whole split"),
            "metric": Key(
                "auto",
                'what judges a model: "auto", its own metric, or fidelity to `reference` where it '
                'has no head or the data have no labels; "fidelity" always',
            ),
            "reference": Key(
                None, "run or folder to which fidelity is measured, None for the model itself", str
            ),
            "perplexity": Key(
                "token", '"token" weighs labels alike, "published" averages the means of batches'
            ),
            "outliers": Key(
                "published", 'rows of their statistics: "published" by site, "sequence" or "token"'
            ),
            "kurtosis_batches": Key(
                0, "batches of the kurtosis, 0 for all; the original: 257 (BERT), 101 (OPT)"
            ),
        },
        "quant": quant_keys(),
        "penalty": penalty_keys(),
        "distill": distill_keys(),
    }


def distill_keys() -> Keys:
    """Keys of `config.distill`, by which a run stays near a teacher instead of learning labels."""
    return {
        "teacher": Key(
            None, "a run, a published model's folder or hf:org/name, None for no distillation", str
        ),
        "hidden": Key(1.0, "weight of the mean squared error of the last hidden states"),
        "layers": Key(0.0, "weight of the mean squared error of the activations at layer_sites"),
        "layer_sites": Key(
            r"(embeddings/|layer_\d+/ffn_)layer_norm/output",
            "the activations that it is taken of, averaged; a regular expression of sites",
        ),
        "pooled": Key(0.0, "weight of 1 - cosine of the embeddings"),
        "logits": Key(0.0, "weight of the KL divergence of the teacher's distribution, in nats"),
        "logits_positions": Key(
            16, "tokens of each sequence whose distributions are compared, 0 for none"
        ),
    }


def penalty_keys() -> Keys:
    """Keys of `config.penalty`, by which large activations cost whatever is trained."""
    return {
        "weight": Key(0.0, "of mean((|x| / scale)^power) over the sites in the loss, 0 for none"),
        "scale": Key(3.0, "the magnitude of an activation that costs 1, above 0"),
        "power": Key(4, "how steeply the cost rises, at least 1"),
        "sites": Key(
            r"layer_\d+/(attention|ffn)_(residual|layer_norm/output)",
            "the activations that it is taken of, a regular expression of sites by full path",
        ),
    }


def quant_keys() -> Keys:
    """Keys of `config.quant`: fields of `QuantSpec`, and what else a study or training needs."""
    return {
        **derived(QuantSpec, _names(QuantSpec, NOT_OF_QUANT)),
        "coverage": Key(
            "fp32_head",
            '"fp32_head" leaves the head in floating point, "all" does not; "+int16_final_LN" or '
            '"+int16_all_LN" may follow',
        ),
        "calibration_batches": Key(16, "batches that ranges are taken from"),
        "calibration_batch_size": Key(16, "examples of such a batch"),
        "site_bits": Key(
            "", "bits by expression, as `layer_0/.*=4 .*/scores=16`; the first match decides"
        ),
        "train": Key(False, "quantization-aware training, on the grids of quant.train_setting"),
        "train_setting": Key("w8a8", "the setting that is trained, as `eval.py --quant` takes it"),
        "train_ranges": Key("running", 'its ranges: "running" min-max, or "learned" by gradients'),
        # Adam moves a learned scale by about so much in a step, however small the scale is.
        "range_learning_rate": Key(
            None, "peak learning rate of learned ranges, None for that of the weights", float
        ),
    }


def model_keys(family: str) -> Keys:
    """Keys of `config.model`: fields of the family's dataclass, and of its attention."""
    config = FAMILIES[family].config
    softmax = inspect.signature(make_softmax).parameters["kind"].default
    return {
        "name": Key(family, "the family; it decides the other keys and cannot be overridden"),
        **derived(config, _names(config, NOT_OF_MODEL)),
        "dtype": Key(jnp.dtype(config.dtype).name, meaning(config, "dtype")),
        "attention": {
            "softmax": Key(softmax, meaning(make_softmax, "kind")),
            **derived(make_softmax, _names(make_softmax, NOT_OF_SOFTMAX)),
            "gate": Key("none", f'"none", or each head\'s gate: {meaning(GateConfig, "kind")}'),
            **derived(GateConfig, _names(GateConfig, ("kind",)), prefix="gate_"),
            **derived(TransformerConfig, OF_ATTENTION),
        },
    }


def data_keys(family: str) -> Keys:
    """Keys of `config.data`."""
    config = FAMILIES[family].config
    images = config.data == "images"
    return {
        "source": Key(
            "auto",
            '"auto" (files if there are any, else embedded), "embedded", "files" (of images: '
            '"folder"), "tfds:NAME", "hf:NAME[,CONFIG]", or corpora mixed as '
            '"tfds:A*0.7,files*0.3"',
        ),
        "validation_fraction": Key(0.05, "share set aside where the data have no validation split"),
        "workers": Key(0, "processes that make batches, 0 for a thread"),
        "files": Key(None, "training data: paths, globs and folders, parted by commas", str),
        "validation_files": Key(None, "the same for validation", str),
        "tfds_dir": Key(None, "where TFDS keeps its datasets, None for its default", str),
        **(_images() if images else _text(config.vocab_size, config.data == "masked text")),
    }


def _text(vocab_size: int, masked: bool) -> Keys:
    of_masked = {
        "mask_rate": Key(0.15, "share of tokens to predict, in (0, 1]"),
        "label_key": Key(
            None,
            "the key, feature or column that holds the class of a text, None for text alone; of a "
            "model that classifies",
            str,
        ),
    }
    lowercase = {
        "lowercase": Key(
            None, "lower-case a vocab.txt; None: as files beside it say, a trained one does", bool
        )
    }
    return {
        "seq_len": Key(128, "tokens of an example"),
        "text_key": Key("text", "the key of a JSON line, feature or column that holds the text"),
        **(of_masked if masked else {}),
        "cache_dir": Key(None, "where packed tokens are kept, None for the user's cache", str),
        "tokenizer": {
            "vocab_size": Key(vocab_size, "tokens of one that is trained on the corpus"),
            **(lowercase if masked else {}),
            "file": Key(None, "a tokenizer's file or folder, None to train one", str),
        },
    }


def _images() -> Keys:
    return {
        "image_key": Key("image", "the feature of TFDS that holds the image"),
        "label_key": Key("label", "the one that holds the class, None for images alone", str),
        "on_corrupt": Key("error", '"error" ends training, "skip" trains on the next image'),
        "eval_crop": Key(1.0, "share of the shorter side that the centre crop keeps, in (0, 1]"),
        "augment": {
            "repeats": Key(1, "how often an image comes in a row, each time augmented anew"),
            "crop_scale": Key(1.0, "smallest share of the area in a random resized crop, 1: none"),
            "pad_crop": Key(0, "pixels of padding around the image before a random crop"),
            "flip": Key(False, "mirror half of the images"),
            "rand_layers": Key(0, "RandAugment: operations per image, 0 for none"),
            "rand_magnitude": Key(9.0, "how strong they are, of 10"),
            "rand_magnitude_std": Key(0.0, "standard deviation of that"),
            # RandAugment has changes of all three, so recipes have one of the two.
            "color_jitter": Key(0.0, "brightness, contrast, saturation within 1 ± this"),
            "erase_probability": Key(0.0, "of a box of noise; timm and DeiT: 0.25"),
            "erase_min_area": Key(0.02, "least size of that box, as a share of the image"),
            "erase_max_area": Key(1 / 3, "largest size of it"),
        },
    }
