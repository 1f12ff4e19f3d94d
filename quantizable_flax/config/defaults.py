"""Every configuration key with its default: shared ones, and those of each model family.

What a model, its attention or a quantization scheme is made of is said once, by the dataclass (or
the function's arguments) that takes it: those keys and defaults are derived.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from quantizable_flax.models import build
from quantizable_flax.models.transformer import TransformerConfig
from quantizable_flax.nn.gate import GateConfig
from quantizable_flax.nn.softmax import make_softmax
from quantizable_flax.quantization.spec import BIT_FIELDS, QuantSpec

FAMILIES = build.FAMILIES
OF_TRAINING = ("remat", "loss_chunk")  # fields of a model that are keys of `config.train`
# Fields of a model and of a scheme that other keys say, and arguments that follow from the model.
NOT_OF_MODEL = (*OF_TRAINING, "dtype", "softmax", "gate", "quant")
NOT_OF_QUANT = (*BIT_FIELDS, "head", "site_bits", "backend")
NOT_OF_SOFTMAX = ("kind", "seq_len", "causal")


def derived(owner: Callable[..., Any], names: Iterable[str], *, prefix: str = "") -> dict[str, Any]:
    """One key for each of the named arguments of a dataclass or function, with its default.

    An argument that may be None becomes a placeholder of its type, so that a command line can set
    and unset it.
    """
    parameters = inspect.signature(owner).parameters
    hints = typing.get_type_hints(owner)
    keys: dict[str, Any] = {}
    for name in names:
        value, kinds = parameters[name].default, set(typing.get_args(hints[name]))
        if types.NoneType in kinds:
            (kind,) = kinds - {types.NoneType}
            reference = config_dict.placeholder(kind)
            reference.set(value)
            value = reference
        keys[prefix + name] = value
    return keys


def _names(owner: Callable[..., Any], without: Iterable[str]) -> list[str]:
    return [name for name in inspect.signature(owner).parameters if name not in without]


def shared_defaults() -> ConfigDict:
    """Keys that every family has."""
    config = ConfigDict()
    config.name = config_dict.placeholder(str)  # a row's name in tables; default: the workdir's
    config.init_from = config_dict.placeholder(str)  # a run whose parameters a new run starts from
    config.seed = 0
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "schedule": "linear",  # or "cosine"
            "warmup_steps": 100,
            "warmup_from": 0.0,  # learning rate of the first step
            "decay_to": 0.0,  # learning rate after the last step
            "decay_steps": 0,  # length of the schedule, 0 for train.steps
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "decay_layer_norm": False,
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 32,
            "accumulate": 1,
            **derived(TransformerConfig, OF_TRAINING),
            "prefetch": 2,  # batches on the devices ahead of the step
            "log_every": 50,
            "eval_every": 500,
            "eval_batches": 8,
            "telemetry_every": 0,  # outlier telemetry every N steps, 0 for none
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every": 500,
            "keep": 2,  # the last so many stay
            "keep_every": 0,  # and so do all of every N-th step, 0 for none
        }
    )
    # Sizes of the mesh, -1: all remaining devices.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
    config.eval = ConfigDict(
        {
            "batch_size": 32,
            "batches": 0,  # 0: the whole split
            "perplexity": "token",
            "outliers": "published",  # rows of the statistics: "published", "sequence" or "token"
            "kurtosis_batches": 0,  # 0: all; the original stops after 257 (BERT), 101 (OPT)
        }
    )
    config.quant = quant_defaults()
    return config


def quant_defaults() -> ConfigDict:
    """Keys of `config.quant`: fields of `QuantSpec`, and what else a study or training needs."""
    quant = ConfigDict(derived(QuantSpec, _names(QuantSpec, NOT_OF_QUANT)))
    quant.update(
        {
            "setup": "fp32_head",  # or "all"; "+int16_final_LN", "+int16_all_LN" may follow
            "calibration_batches": 16,
            "calibration_batch_size": 16,
            "site_bits": "",  # e.g. "layer_0/.*=4 .*/scores=16", the first match decides
            "train": False,  # quantization-aware training, see ptq/trained.py
            "bits": "w8a8",  # what is trained
            "train_ranges": "running",  # or "learned"
        }
    )
    # Adam moves a learned scale by about so much in a step, however small the scale is.
    quant.range_learning_rate = config_dict.placeholder(float)  # None: as the weights
    return quant


def model_defaults(family: str) -> ConfigDict:
    """Keys of `config.model`: fields of the family's dataclass, and of its attention."""
    config = FAMILIES[family].config
    model = ConfigDict(derived(config, _names(config, NOT_OF_MODEL)))
    model.name = family
    model.dtype = jnp.dtype(config.dtype).name
    softmax = inspect.signature(make_softmax).parameters["kind"].default
    model.attention = ConfigDict({"softmax": softmax, "gate": "none"})
    model.attention.update(derived(make_softmax, _names(make_softmax, NOT_OF_SOFTMAX)))
    model.attention.update(derived(GateConfig, _names(GateConfig, ("kind",)), prefix="gate_"))
    return model


def data_defaults(family: str) -> ConfigDict:
    """Keys of `config.data`."""
    data = ConfigDict({"source": "auto", "validation_fraction": 0.05, "workers": 0})
    data.files = config_dict.placeholder(str)
    data.validation_files = config_dict.placeholder(str)
    data.tfds_dir = config_dict.placeholder(str)  # where TFDS keeps its datasets, None: its default
    config = FAMILIES[family].config
    if config.data == "images":
        data.update(_images())
    else:
        data.update(_text(config.vocab_size, masked=config.data == "masked text"))
    return data


def _text(vocab_size: int, *, masked: bool) -> ConfigDict:
    data = ConfigDict({"seq_len": 128, "text_key": "text"})
    if masked:
        data.mask_rate = 0.15
    data.cache_dir = config_dict.placeholder(str)
    data.tokenizer = ConfigDict({"vocab_size": vocab_size})
    if masked:
        # None: as the files beside tokenizer.file say; a trained one lower-cases.
        data.tokenizer.lowercase = config_dict.placeholder(bool)
    data.tokenizer.file = config_dict.placeholder(str)
    return data


def _images() -> ConfigDict:
    return ConfigDict(
        {
            "image_key": "image",
            "label_key": "label",
            "on_corrupt": "error",  # or "skip": in training, the next image takes its place
            "eval_crop": 1.0,  # share of the shorter side that the centre crop keeps
            "augment": {
                "repeats": 1,  # how often an image comes in a row, each time augmented anew
                "crop_scale": 1.0,  # smallest share of the area in a random resized crop, 1: none
                "pad_crop": 0,  # pixels of padding around the image before a random crop
                "flip": False,
                "rand_layers": 0,  # RandAugment: operations per image, 0: none
                "rand_magnitude": 9.0,  # of 10
                "rand_magnitude_std": 0.0,
                # Brightness, contrast, saturation within 1 +- this; RandAugment has changes of all
                # three, so recipes have one of the two.
                "color_jitter": 0.0,
                "erase_probability": 0.0,  # of a box of noise; timm and DeiT: 0.25
                "erase_min_area": 0.02,  # of that box, as a share of the image
                "erase_max_area": 1 / 3,
            },
        }
    )
