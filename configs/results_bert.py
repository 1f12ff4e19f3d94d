"""The BERT of the table of methods: 3 layers of 128, 8,000 steps, 13 minutes on a CPU core.

    python train.py --config=configs/results_bert.py:gated --workdir=runs/gated

Variants: one a method, see `_methods.py`. Data: the documentation text of Python's own standard
library. `make results-bert` trains all of them with two seeds and writes docs/results/bert.md.

It leaves the plateau of word frequencies near step 2000. Without weight decay, and with a learning
rate that is still nearly half of its peak at the end: outliers of small models grow while it is
high, and a fall to a tenth within these steps halves vanilla's infinity norm. INT8 feels outliers
in models of a larger size: configs/results_bert_wiki.py, docs/results.md.
"""

from configs import quickstart
from configs._methods import a_run, methods, variants

VARIANTS = variants(methods(pi_init=0.9))


def get_config(variant="vanilla"):
    config = quickstart.get_config()
    config.model.num_layers = 3
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "cosine"
    config.optimizer.decay_to = 2e-4
    config.optimizer.decay_steps = 14_000
    return a_run(config, variant, VARIANTS, steps=8_000)
