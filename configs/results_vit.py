"""The ViT of the table of methods: 4 layers of 96 on 8 x 8 digits, two minutes on a CPU core.

    python train.py --config=configs/results_vit.py:gated --workdir=runs/gated

Variants: one a method, see `_methods.py`. Data: scikit-learn's handwritten digits. `make
results-vit` trains all of them with two seeds and writes docs/results/vit.md. CIFAR-10 instead:
configs/vit_cifar10.py.
"""

from configs import vit_digits
from configs._methods import beside, methods, variants
from quantizable_flax.config import apply_variant

METHODS = methods(pi_init=0.5)
# The paper's clipped and gated ViTs have a LayerNorm behind the patches, its vanilla one has none.
PATCHES = beside("patch_layer_norm", {"model.patch_layer_norm": True}, METHODS)
VARIANTS = variants({**METHODS, **PATCHES})


def get_config(variant="vanilla"):
    config = vit_digits.get_config()
    config.name = variant
    return apply_variant(config, variant, VARIANTS)
