"""The BERT of the table of methods where INT8 feels outliers: 6 layers of 512 on Wikipedia.

    python -m benchmarks.results --family=bert_wiki --config.data.files=train.jsonl.xz \\
        --config.data.validation_files=validation.jsonl.xz

Variants: one a method, see `_methods.py`; gates start half open, as published. 14,000 steps of 64 x
128 tokens at a peak learning rate of 5e-4, in bfloat16: two minutes each alone on an H200, days on
2 CPU cores.
"""

from configs import bert_base
from configs._methods import a_run, methods, variants

METHODS = methods(pi_init=0.5)
VARIANTS = variants(
    # By -0.025 a young model's probabilities of 128 tokens are all clipped to 0.
    {**METHODS, "clipped_published": {**METHODS["clipped"], "model.attention.alpha": 3.2}}
)


def get_config(variant="vanilla"):
    config = bert_base.get_config()
    config.data.source = "files"  # embedded text is too little for it
    config.model.vocab_size = config.data.tokenizer.vocab_size = 8192
    config.model.hidden_size = 512
    config.model.num_heads = 8
    config.model.num_layers = 6
    config.model.intermediate_size = 2048
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1_000
    config.train.batch_size = 64
    config.eval.batch_size = 64
    return a_run(config, variant, VARIANTS, steps=14_000)
