"""A ViT small enough for a laptop: scikit-learn's 8 x 8 digits, about a minute on 2 CPU cores.

    python train.py --config=configs/vit_digits.py:gated --workdir=runs/digits_gated

Variants: vanilla, clipped, gated. 1797 real images of handwritten digits, one in five of them for
validation, no download. `make demo-vit` trains all three variants.
"""

from quantizable_flax.config import apply_variant, default_config


def vanilla(config):
    """The usual softmax attention."""


def clipped(config):
    """Clipped softmax, gamma = -0.25 / 17."""
    config.model.attention.softmax = "clipped"
    config.model.attention.alpha = 0.25


def gated(config):
    """Linear gated attention, every gate starting half open."""
    config.model.attention.gate = "linear"


VARIANTS = {"vanilla": vanilla, "clipped": clipped, "gated": gated}


def get_config(variant="vanilla"):
    config = default_config("vit")
    model = config.model
    model.image_size = 8
    model.patch_size = 2
    model.channels = 1
    model.num_classes = 10
    model.hidden_size = 96
    model.num_layers = 4
    model.num_heads = 4
    model.intermediate_size = 384
    model.initializer_range = 0.05  # the published 0.02 is for width 384
    model.pixel_mean = (0.305,)
    model.pixel_std = (0.376,)
    model.label_smoothing = 0.1
    config.data.validation_fraction = 0.2
    config.data.augment.pad_crop = 1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.warmup_from = 1e-6
    config.optimizer.decay_to = 1e-5
    config.optimizer.weight_decay = 0.05
    config.train.steps = 1_500
    config.train.batch_size = 64
    config.train.log_every = 250
    config.train.eval_every = 500
    config.train.eval_batches = 0
    config.train.telemetry_every = 250
    config.eval.batch_size = 60
    config.checkpoint.every = 1_000
    return apply_variant(config, variant, VARIANTS)
