"""Repairs a finished model for INT8: it stays near itself while its large activations shrink.

    python train.py --config=configs/tune.py:plain --config.init_from=MODEL --workdir=runs/tuned \\
        --config.data.files='corpus/*.jsonl.xz'

MODEL is a published folder, hf:org/name or a run of ours; --config=configs/tune.py:plain,MODEL says
the same. No labels are needed. Variants: plain, gated (adds linear gates that change nothing at the
start), clipped (clips the softmax, which changes the function at once).
Hardware: any; on a 2-core x86 CPU a 6 x 384 BERT takes two steps of 16 x 64 tokens a second, on its
grids (--config.quant.train=True --config.quant.train_setting=w8a8+channel) 1.4.
Measured so, all-MiniLM-L6-v2 on English Wikipedia (three seeds): largest infinity norm 222 -> 19;
cosine of the embeddings to those of the published model in W8A8 with weights per channel 0.842 ->
0.9815, in floating point 0.990. docs/tuning.md has a decoder and a ViT.
"""

from quantizable_flax.config import apply_variant
from quantizable_flax.errors import UserError
from quantizable_flax.training.tuning import begin

TAKES_MODEL = True


def plain(config):
    """The attention that the model has."""


def gated(config):
    """Linear gates beside the attention that the model has; they begin as the identity."""
    attention = config.model.attention
    if attention.gate != "none":
        raise UserError(
            f"{config.init_from} has gates already, {attention.gate}: choose the variant plain."
        )
    attention.gate = "linear"
    attention.gate_finetune = True
    attention.gate_init_std = 0.001


def clipped(config):
    """Clipped softmax, gamma = -0.25 / tokens, as little as the small recipes clip."""
    config.model.attention.softmax = "clipped"
    config.model.attention.gamma = None
    config.model.attention.alpha = 0.25


VARIANTS = {"plain": plain, "gated": gated, "clipped": clipped}


def get_config(argument="plain"):
    variant, _, model = argument.partition(",")
    config = begin(model)
    config.distill.hidden = 1.0
    config.distill.layers = 1.0
    config.distill.logits = 1.0
    config.penalty.weight = 0.06
    if "seq_len" in config.data:  # half of a small encoder's parameters, which have no outliers
        config.optimizer.frozen = "embeddings/word/.*"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_to = 1e-5
    config.optimizer.weight_decay = 0.01
    config.train.steps = 420
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 50
    config.train.telemetry_every = 50
    config.checkpoint.every = 100
    return apply_variant(config, variant or "plain", VARIANTS)
