"""OPT-125m as published (arXiv 2306.12929, section 5): 125k steps of 192 x 512 tokens.

    python train.py --config=configs/opt_125m.py:gated --workdir=runs/opt_125m_gated \\
        --config.data.source=tfds:wikipedia/20230601.en --config.data.tokenizer.file=opt_tokenizer

Variants: vanilla, vanilla_decay (weight decay on LayerNorm gamma too, the confounder of gated),
clipped (alpha 12), gated (linear, pi 0.25, with that decay), gated_all_heads (the same with one
linear layer on all features).
Hardware: the batch is split over all devices. Activations take about 1.2 GB per sequence (estimated
from programs of 1 and 3 layers compiled for CPU): on few devices raise train.grad_accum_steps.
Published on BookCorpus and English Wikipedia (FP ppl / W8A8 ppl): vanilla 15.84 / 21.18,
vanilla_decay 15.96 / 39.46, clipped 16.29 / 37.20, gated 15.55 / 16.02, gated_all_heads
15.53 / 16.09. Not rerun by us at this length.
"""

from quantizable_flax.config import apply_variant, default_config


def vanilla(config):
    """The usual softmax attention."""


def vanilla_decay(config):
    """Weight decay on LayerNorm gamma as well."""
    config.optimizer.decay_layer_norm = True


def clipped(config):
    """Clipped softmax, gamma = -12 / 512."""
    config.model.attention.softmax = "clipped"
    config.model.attention.alpha = 12.0


def gated(config):
    """Linear gated attention, every gate a quarter open at the start."""
    config.model.attention.gate = "linear"
    config.model.attention.gate_pi_init = 0.25
    config.optimizer.decay_layer_norm = True


def gated_all_heads(config):
    """One linear layer on all features gives the gates of all heads."""
    gated(config)
    config.model.attention.gate = "all_heads_linear"


VARIANTS = {
    "vanilla": vanilla,
    "vanilla_decay": vanilla_decay,
    "clipped": clipped,
    "gated": gated,
    "gated_all_heads": gated_all_heads,
}


def get_config(variant="vanilla"):
    config = default_config("opt")
    config.model.dtype = "bfloat16"
    config.model.attention.gate_init_std = 0.006
    config.data.seq_len = 512
    config.data.validation_fraction = 0.001
    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.train.steps = 125_000
    config.train.batch_size = 192
    config.train.log_every = 100
    config.train.eval_every = 5_000
    config.train.eval_batches = 64
    config.train.telemetry_every = 1_000
    config.checkpoint.every = 5_000
    return apply_variant(config, variant, VARIANTS)
