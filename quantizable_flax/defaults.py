"""Every configuration key with its default: shared ones, and those of each model family."""

from ml_collections import ConfigDict, config_dict


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
            "remat": "none",  # what the backward pass computes again: "none", "dots" or "full"
            "loss_chunk": 128,  # positions of a sequence whose logits exist at a time, 0: all
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
    """Keys of `config.quant`; see `quantization.spec.QuantSpec` for what they mean."""
    return ConfigDict(
        {
            "setup": "fp32_head",  # or "all"; "+int16_final_LN", "+int16_all_LN" may follow
            "gated_context": True,
            "calibration_batches": 16,
            "calibration_batch_size": 16,
            "weight_estimator": "minmax",
            "weight_percentile": config_dict.placeholder(float),
            "weight_per_channel": False,
            "activation_estimator": "minmax",
            "activation_symmetric": False,
            "activation_ranges": "static",  # or "token": of each token, at run time
            "site_bits": "",  # e.g. "layer_0/.*=4 .*/scores=16", the first match decides
            "momentum": 0.9,
            "percentile": config_dict.placeholder(float),
            "skip": config_dict.placeholder(str),  # sites that stay in floating point
            "train": False,  # quantization-aware training, see training/qat.py
            "bits": "w8a8",  # what is trained
            "train_ranges": "running",  # or "learned"
            # Adam moves a learned scale by about so much in a step, however small the scale is.
            "range_learning_rate": config_dict.placeholder(float),  # None: as the weights
        }
    )


def model_defaults(family: str) -> ConfigDict:
    """Keys of `config.model`."""
    model = ConfigDict(
        {
            "name": family,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "intermediate_size": 3072,
            "initializer_range": 0.02,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "dtype": "float32",
        }
    )
    model.update(_FAMILY_MODELS[family]())
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


def _bert() -> ConfigDict:
    model = ConfigDict(
        {
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "max_predictions": 0,
        }
    )
    model.pad_token_id = config_dict.placeholder(int)
    return model


def _opt() -> ConfigDict:
    model = ConfigDict(
        {
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.006,
            "attention_dropout": 0.0,
            "pre_layer_norm": True,
        }
    )
    model.embed_size = config_dict.placeholder(int)  # width of the word table, None: hidden_size
    model.pad_token_id = config_dict.placeholder(int)
    return model


def _vit() -> ConfigDict:
    return ConfigDict(
        {
            "hidden_size": 384,
            "num_heads": 6,
            "intermediate_size": 1536,
            "image_size": 224,
            "patch_size": 16,
            "channels": 3,
            "num_classes": 1000,
            "layer_norm_eps": 1e-6,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "patch_layer_norm": False,
            "num_registers": 0,
            "pixel_mean": (0.5, 0.5, 0.5),  # of pixels in [0, 1], one value per channel
            "pixel_std": (0.5, 0.5, 0.5),
            "label_smoothing": 0.0,
            "mixup_alpha": 0.0,  # 0: no Mixup
            "cutmix_alpha": 0.0,  # 0: no CutMix
            "mix_probability": 1.0,  # of mixing a batch at all
            "cutmix_share": 0.5,  # of CutMix among mixed batches, where both are on
        }
    )


_FAMILY_MODELS = {"bert": _bert, "opt": _opt, "vit": _vit}
FAMILIES = tuple(_FAMILY_MODELS)


def data_defaults(family: str) -> ConfigDict:
    """Keys of `config.data`."""
    data = ConfigDict({"source": "auto", "validation_fraction": 0.05, "workers": 0})
    data.files = config_dict.placeholder(str)
    data.validation_files = config_dict.placeholder(str)
    data.tfds_dir = config_dict.placeholder(str)  # where TFDS keeps its datasets, None: its default
    if family == "vit":
        data.update(_images())
    else:
        data.update(_text(family))
    return data


def _text(family: str) -> ConfigDict:
    data = ConfigDict({"seq_len": 128, "text_key": "text"})
    if family == "bert":
        data.mask_rate = 0.15
    data.cache_dir = config_dict.placeholder(str)
    data.tokenizer = ConfigDict(
        {"vocab_size": 30522, "lowercase": True} if family == "bert" else {"vocab_size": 50272}
    )
    data.tokenizer.file = config_dict.placeholder(str)
    return data


def _images() -> ConfigDict:
    return ConfigDict(
        {
            "image_key": "image",
            "label_key": "label",
            "eval_crop": 1.0,  # share of the shorter side that the centre crop keeps
            "augment": {
                "repeats": 1,  # how often an image comes in a row, each time augmented anew
                "crop_scale": 1.0,  # smallest share of the area in a random resized crop, 1: none
                "pad_crop": 0,  # pixels of padding around the image before a random crop
                "flip": False,
                "rand_layers": 0,  # RandAugment: operations per image, 0: none
                "rand_magnitude": 9.0,  # of 10
                "rand_magnitude_std": 0.0,
                "color_jitter": 0.0,  # brightness, contrast, saturation within 1 +- this
            },
        }
    )
