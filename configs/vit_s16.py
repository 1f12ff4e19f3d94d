"""ViT-S/16 on ImageNet-1k as published (arXiv 2306.12929, section 5): 300 epochs of 224 px.

    python train.py --config=configs/vit_s16.py:gated --workdir=runs/vit_s16_gated \\
        --config.data.source=tfds:imagenet2012

or from folders: --config.data.files=imagenet (imagenet/train/CLASS/*.JPEG, imagenet/val/...).

Variants: vanilla, vanilla_ln (a LayerNorm behind the patch embedding, the confounder of the other
two), clipped (gamma -1e-4) and gated (linear, pi 0.5), both with that LayerNorm.
Augmentation as DeiT's (arXiv 2012.12877): RandAugment, Mixup, CutMix, random resized crop, flip,
label smoothing 0.1. The published list also has colour jitter 0.4. timm's recipes of this kind
leave it out wherever RandAugment is on, which changes colours itself, and so does this one; a run
that began with it continues with --config.data.augment.color_jitter=0.4. Random erasing, which is
DeiT's but not in the list, is off: --config.data.augment.erase_probability=0.25.
Hardware: the batch is split over all devices; on few of them raise train.grad_accum_steps.
Published top-1 (FP / W8A8): vanilla 80.75 / 69.24, vanilla_ln 80.98 / 79.62, clipped
80.89 / 79.77, gated 81.01 / 79.82. Not rerun by us.
"""

from quantizable_flax.config import apply_variant, default_config

EPOCH = 1_281_167 / 512  # steps


def vanilla(config):
    """The usual softmax attention."""


def vanilla_ln(config):
    """A LayerNorm behind the patch embedding."""
    config.model.patch_layer_norm = True


def clipped(config):
    """Clipped softmax, gamma -1e-4."""
    config.model.patch_layer_norm = True
    config.model.attention.softmax = "clipped"
    config.model.attention.gamma = -1e-4


def gated(config):
    """Linear gated attention, every gate starting half open."""
    config.model.patch_layer_norm = True
    config.model.attention.gate = "linear"


VARIANTS = {"vanilla": vanilla, "vanilla_ln": vanilla_ln, "clipped": clipped, "gated": gated}


def get_config(variant="vanilla"):
    config = default_config("vit")
    model, data = config.model, config.data
    model.dtype = "bfloat16"
    model.pixel_mean = (0.485, 0.456, 0.406)
    model.pixel_std = (0.229, 0.224, 0.225)
    model.label_smoothing = 0.1
    model.mixup_alpha = 0.8
    model.cutmix_alpha = 1.0
    data.workers = 16
    data.eval_crop = 0.9
    data.augment.crop_scale = 0.08
    data.augment.flip = True
    data.augment.rand_layers = 2
    data.augment.rand_magnitude = 9.0
    data.augment.rand_magnitude_std = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = round(20 * EPOCH)
    config.optimizer.warmup_from = 1e-6
    config.optimizer.decay_to = 1e-5
    config.optimizer.weight_decay = 0.03
    config.optimizer.clip_norm = 0.0
    config.train.steps = round(300 * EPOCH)
    config.train.batch_size = 512
    config.train.log_every = 100
    config.train.eval_every = round(10 * EPOCH)
    config.train.eval_batches = 0
    config.train.telemetry_every = 1_000
    config.eval.batch_size = 256
    config.checkpoint.every = round(5 * EPOCH)
    return apply_variant(config, variant, VARIANTS)
