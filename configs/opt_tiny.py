"""An OPT small enough for a laptop: 2 layers of 128, trained in about two minutes on 2 CPU cores.

    python train.py --config=configs/opt_tiny.py:gated --workdir=runs/opt_gated

Variants: vanilla, clipped, gated. Data: the documentation text of Python's own standard library,
or yours with --config.data.files=corpus.jsonl.xz. `make demo-opt` trains all three variants.
"""

from quantizable_flax.config import apply_variant, default_config


def vanilla(config):
    """The usual softmax attention."""


def clipped(config):
    """Clipped softmax, gamma = -0.25 / 64."""
    config.model.attention.softmax = "clipped"
    config.model.attention.alpha = 0.25


def gated(config):
    """Linear gated attention, every gate a quarter open at the start, as published."""
    config.model.attention.gate = "linear"
    config.model.attention.gate_pi_init = 0.25


VARIANTS = {"vanilla": vanilla, "clipped": clipped, "gated": gated}


def get_config(variant="vanilla"):
    config = default_config("opt")
    config.model.vocab_size = 1024
    config.model.hidden_size = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.intermediate_size = 512
    config.model.max_position_embeddings = 64
    config.model.hidden_dropout = 0.0
    # The published 0.006 is for width 768.
    config.model.initializer_range = 0.02
    config.data.seq_len = 64
    config.data.tokenizer.vocab_size = 1024
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.train.steps = 1500
    config.train.batch_size = 32
    config.train.log_every = 250
    config.train.eval_every = 250
    config.train.eval_batches = 0
    config.train.telemetry_every = 250
    config.eval.batch_size = 64
    config.checkpoint.every = 500
    return apply_variant(config, variant, VARIANTS)
