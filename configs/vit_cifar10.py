"""A small ViT on CIFAR-10: 4 layers of 128, patches of 4 x 4, about 20 minutes on 2 CPU cores.

    python train.py --config=configs/vit_cifar10.py:gated --workdir=runs/cifar10_gated \\
        --config.data.source=tfds:cifar10

or from folders or tar files of them: --config.data.files='cifar10/train-*.tar'
--config.data.validation_files=cifar10/test.tar (members class/name.png or split/class/name.png).

Variants: vanilla, clipped, gated. Eight epochs. On an accelerator train a larger one for longer
and augment more: --config.model.num_layers=9 --config.train.steps=150000
--config.data.augment.rand_layers=2 --config.model.mixup_alpha=0.8 --config.model.cutmix_alpha=1.0
"""

from quantizable_flax.config import apply_variant, default_config


def vanilla(config):
    """The usual softmax attention."""


def clipped(config):
    """Clipped softmax, gamma -1e-4 as published for ViT-S/16."""
    config.model.attention.softmax = "clipped"
    config.model.attention.gamma = -1e-4


def gated(config):
    """Linear gated attention, every gate starting half open."""
    config.model.attention.gate = "linear"


VARIANTS = {"vanilla": vanilla, "clipped": clipped, "gated": gated}


def get_config(variant="vanilla"):
    config = default_config("vit")
    model = config.model
    model.image_size = 32
    model.patch_size = 4
    model.num_classes = 10
    model.hidden_size = 128
    model.num_layers = 4
    model.num_heads = 4
    model.intermediate_size = 256
    model.initializer_range = 0.05  # the published 0.02 is for width 384
    model.pixel_mean = (0.4914, 0.4822, 0.4465)
    model.pixel_std = (0.2470, 0.2435, 0.2616)
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 300
    config.optimizer.warmup_from = 1e-6
    config.optimizer.decay_to = 1e-5
    config.optimizer.weight_decay = 0.05
    config.train.steps = 6_000
    config.train.batch_size = 64
    config.train.log_every = 250
    config.train.eval_every = 1_500
    config.train.eval_batches = 0
    config.train.telemetry_every = 1_000
    config.eval.batch_size = 256
    config.checkpoint.every = 1_000
    return apply_variant(config, variant, VARIANTS)
