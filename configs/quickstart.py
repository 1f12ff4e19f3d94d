"""A BERT small enough for a laptop: 4 layers of 128, trained in about two minutes on 2 CPU cores.

    python train.py --config=configs/quickstart.py:clipped --workdir=runs/clipped

Variants: vanilla, clipped, gated. Data: the documentation text of Python's own standard library,
or yours with --config.data.files=corpus.jsonl.xz.
"""

from quantizable_flax.config import apply_variant, default_config


def vanilla(config):
    """The usual softmax attention."""


def clipped(config):
    """Clipped softmax with the published best gamma for BERT-base."""
    config.model.attention.softmax = "clipped"
    config.model.attention.gamma = -0.025


def gated(config):
    """Linear gated attention, every gate starting half open."""
    config.model.attention.gate = "linear"


VARIANTS = {"vanilla": vanilla, "clipped": clipped, "gated": gated}


def get_config(variant="vanilla"):
    config = default_config()
    config.name = variant
    config.model.vocab_size = 4096
    config.model.hidden_size = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.intermediate_size = 512
    config.model.max_position_embeddings = 128
    config.model.hidden_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.max_predictions = 24
    config.data.seq_len = 64
    config.data.tokenizer.vocab_size = 4096
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 1000
    config.train.batch_size = 32
    config.train.eval_every = 500
    config.checkpoint.every = 500
    return apply_variant(config, variant, VARIANTS)
