"""OPT-1.3B as published (arXiv 2306.12929, section 5): 24 layers of 2048, 100k steps of 256 x 512.

    python train.py --config=configs/opt_1_3b.py:gated --workdir=runs/opt_1_3b_gated \\
        --config.mesh.fsdp=16 --config.train.remat=full --config.train.grad_accum_steps=4 \\
        --config.data.source=tfds:wikipedia/20230601.en --config.data.tokenizer.file=opt_tokenizer

Variants: those of opt_125m.py. Parameters and AdamW state take 16 GB in float32, so shard them
(mesh.fsdp) and keep few activations (train.remat, train.grad_accum_steps): as above a step takes
6.5 GiB of each of 16 TPU v6e chips, by compilation ahead of time (docs/aot.md), not executed.
Published (FP ppl / W8A8 ppl): vanilla 12.13 / 989.6, gated 12.21 / 29.95. Not rerun by us.
"""

from configs import opt_350m


def get_config(variant="vanilla"):
    config = opt_350m.get_config(variant)
    config.model.hidden_size = 2048
    config.model.num_heads = 32
    config.model.intermediate_size = 8192
    return config
