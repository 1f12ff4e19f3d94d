"""BERT with 6 layers, the smaller model of the paper's ablations (arXiv 2306.12929, section 3).

    python train.py --config=configs/bert_6l.py:gated --workdir=runs/bert_6l_gated \\
        --config.data.files='corpus/*.jsonl.xz' --config.data.tokenizer.file=vocab.txt

Variants: vanilla, clipped, gated, as in bert_base.py. Half the depth, else that recipe.
"""

from configs import bert_base


def get_config(variant="vanilla"):
    config = bert_base.get_config(variant)
    config.model.num_layers = 6
    return config
