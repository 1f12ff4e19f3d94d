"""The configuration: every key with its default, variants, overrides, and the checks on them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict
from ml_collections.config_flags import config_flags

from quantizable_flax.errors import UserError, nearest


def default_config() -> ConfigDict:
    """Returns every key that a recipe may set; unset ones are typed placeholders."""
    config = ConfigDict()
    config.name = config_dict.placeholder(str)  # a row's name in tables; default: the workdir's
    config.seed = 0
    config.model = _model()
    config.data = _data()
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "warmup_steps": 100,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "decay_layer_norm": False,
            "decay_steps": 0,  # length of the schedule, 0 for train.steps
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 32,
            "accumulate": 1,
            "log_every": 50,
            "eval_every": 500,
            "eval_batches": 8,
            "telemetry_every": 0,  # outlier telemetry every N steps, 0 for none
        }
    )
    config.checkpoint = ConfigDict({"every": 500, "keep": 2})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
    config.eval = ConfigDict(
        {
            "batch_size": 32,
            "batches": 0,  # 0: the whole split
            "perplexity": "token",
            "kurtosis_batches": 0,  # 0: all; the original stops after 257 batches of BERT
        }
    )
    config.quant = ConfigDict(
        {
            "calibration_batches": 16,
            "calibration_batch_size": 16,
            "weight_estimator": "minmax",
            "weight_per_channel": False,
            "activation_symmetric": False,
            "momentum": 0.9,
            "percentile": config_dict.placeholder(float),
        }
    )
    return config


def _model() -> ConfigDict:
    model = ConfigDict(
        {
            "name": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "initializer_range": 0.02,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "max_predictions": 0,
            "dtype": "float32",
        }
    )
    model.pad_token_id = config_dict.placeholder(int)
    model.attention = ConfigDict({"softmax": "vanilla", "gate": "none"})
    attention = model.attention
    for key in ("gamma", "zeta", "alpha"):
        attention[key] = config_dict.placeholder(float)
    attention.gate_per = "token"
    attention.gate_hidden = 4
    attention.gate_pi_init = 0.5
    attention.gate_init_std = 0.02
    attention.gate_finetune = False
    return model


def _data() -> ConfigDict:
    data = ConfigDict({"source": "auto", "seq_len": 128, "text_key": "text"})
    data.files = config_dict.placeholder(str)
    data.validation_files = config_dict.placeholder(str)
    data.validation_fraction = 0.05
    data.mask_rate = 0.15
    data.cache_dir = config_dict.placeholder(str)
    data.tokenizer = ConfigDict({"vocab_size": 30522, "lowercase": True})
    data.tokenizer.file = config_dict.placeholder(str)
    return data


def apply_variant(
    config: ConfigDict, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Runs the named variant's change on config and returns it.

    Raises:
      UserError: the variant is not one of `variants`.
    """
    if variant not in variants:
        raise UserError(
            f"the variant after the colon must be one of {', '.join(variants)}, found "
            f"{variant!r}{nearest(variant, variants)}."
        )
    variants[variant](config)
    return config


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON, unset keys as null."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Rebuilds a typed configuration from `json.loads(to_json(config))`.

    Raises:
      UserError: a key that this version does not know, or a value of another type.
    """
    config = default_config()
    check_keys(config, values)
    try:
        config.update(dict(values))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the stored configuration has a value of another type: {error}."
        ) from error
    return config


def check_keys(config: ConfigDict, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError for the first key of values that config does not have."""
    for key, value in values.items():
        if key not in config:
            raise UserError(
                f"unknown configuration key {prefix}{key}{nearest(key, config.keys())}."
            )
        if isinstance(config.get(key), ConfigDict):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key} is a group of keys, found the value {value!r}.")
            check_keys(config[key], value, f"{prefix}{key}.")


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Applies `--config.a.b=value` arguments to config in place and returns it.

    Raises:
      UserError: unknown key or a value of the wrong type.
    """
    check_arguments(config, arguments)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["override", *arguments]
    )
    try:
        values(["override", *arguments])
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"a configuration override could not be read: {error}") from error
    return config


def check_arguments(config: ConfigDict, arguments: list[str]) -> None:
    """Raises UserError, with the nearest valid name, if a `--config.a.b` key does not exist."""
    for argument in arguments:
        path = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not path.startswith("config."):
            continue
        group = config
        for key in path.split(".")[1:]:
            if not isinstance(group, ConfigDict) or key not in group:
                known = list(group.keys()) if isinstance(group, ConfigDict) else []
                hint = f"; valid here: {', '.join(sorted(known))}" if known else ""
                raise UserError(
                    f"unknown configuration key {path.removeprefix('config.')}"
                    f"{nearest(key, known) or hint}."
                )
            group = group.get(key)


POSITIVE = ("train.steps", "train.log_every", "checkpoint.every", "checkpoint.keep")


def check_positive(config: ConfigDict) -> None:
    """Raises UserError if a count that must be at least 1 is not."""
    for path in POSITIVE:
        group, key = path.split(".")
        if config[group][key] < 1:
            raise UserError(f"{path} must be at least 1, found {config[group][key]}.")
