"""OPT-350m as published (arXiv 2306.12929, section 5): 24 layers of 1024, 100k steps of 256 x 512.

    python train.py --config=configs/opt_350m.py:gated --workdir=runs/opt_350m_gated \\
        --config.data.source=tfds:wikipedia/20230601.en --config.data.tokenizer.file=opt_tokenizer

Variants: those of opt_125m.py. LayerNorm stands before attention and FFN, as in the paper's runs
and unlike Meta's OPT-350m (for that one set model.pre_layer_norm=False, model.embed_size=512).
Published (FP ppl / W8A8 ppl): vanilla 13.19 / 37.52, gated 13.01 / 14.42. Not rerun by us.
"""

from configs import opt_125m


def get_config(variant="vanilla"):
    config = opt_125m.get_config(variant)
    config.model.hidden_size = 1024
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.intermediate_size = 4096
    config.train.steps = 100_000
    config.train.batch_size = 256
    return config
