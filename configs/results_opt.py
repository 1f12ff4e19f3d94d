"""The OPT of the table of methods: 3 layers of 128, 4,000 steps, 7 minutes on a CPU core.

    python train.py --config=configs/results_opt.py:gated --workdir=runs/gated

Variants: one a method, see `_methods.py`. Data: the documentation text of Python's own standard
library. `make results-opt` trains all of them with two seeds and writes docs/results/opt.md. It
stops while the learning rate is half of its peak, as configs/results_bert.py does and says why.
"""

from configs import opt_tiny
from configs._methods import a_run, beside, causal_methods, variants

METHODS = causal_methods(pi_init=0.25)
# The paper's gated OPTs decay the scales of LayerNorms, its vanilla and clipped ones do not.
DECAYED = beside("layer_norm_decay", {"optimizer.decay_layer_norm": True}, METHODS)
VARIANTS = variants({**METHODS, **DECAYED})


def get_config(variant="vanilla"):
    config = opt_tiny.get_config()
    config.model.num_layers = 3
    config.optimizer.learning_rate = 3e-3
    config.optimizer.decay_steps = 8_000
    config.train.batch_size = 16
    return a_run(config, variant, VARIANTS, steps=4_000)
