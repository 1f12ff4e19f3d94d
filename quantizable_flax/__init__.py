"""Quantizable Transformers in JAX/Flax: clipped softmax, gated attention, INT8 evaluation.

Names are imported when they are first used: the attention alone needs jax, flax and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantizable_flax.checkpoint.load import load
    from quantizable_flax.config import default_config
    from quantizable_flax.errors import UserError
    from quantizable_flax.evaluation.any_model import evaluate
    from quantizable_flax.interop import from_state_dict, to_state_dict
    from quantizable_flax.models.build import build_model, with_quant
    from quantizable_flax.models.losses import token_scores
    from quantizable_flax.nn.attention import MultiHeadAttention
    from quantizable_flax.nn.drop_in import attention_fn
    from quantizable_flax.nn.functional import dot_product_attention
    from quantizable_flax.nn.gate import GateConfig
    from quantizable_flax.nn.layers import Dense
    from quantizable_flax.nn.mask import Mask
    from quantizable_flax.nn.softmax import clipped_softmax, softmax
    from quantizable_flax.nn.softmax_config import SoftmaxConfig, make_softmax
    from quantizable_flax.onnx.write import to_onnx
    from quantizable_flax.pretrained.folder import from_pretrained
    from quantizable_flax.pretrained.write import to_huggingface
    from quantizable_flax.ptq.calibrate import calibrate
    from quantizable_flax.ptq.int8 import to_int8
    from quantizable_flax.quantization.sites import Site
    from quantizable_flax.quantization.spec import QuantSpec
    from quantizable_flax.quantization.tensor import values

__version__ = "0.2.0"

__all__ = [
    "Dense",
    "GateConfig",
    "Mask",
    "MultiHeadAttention",
    "QuantSpec",
    "Site",
    "SoftmaxConfig",
    "UserError",
    "attention_fn",
    "build_model",
    "calibrate",
    "clipped_softmax",
    "default_config",
    "dot_product_attention",
    "evaluate",
    "from_pretrained",
    "from_state_dict",
    "load",
    "make_softmax",
    "softmax",
    "to_huggingface",
    "to_int8",
    "to_onnx",
    "to_state_dict",
    "token_scores",
    "values",
    "with_quant",
]

_MODULES = {
    "nn.attention": ("MultiHeadAttention",),
    "nn.drop_in": ("attention_fn",),
    "nn.gate": ("GateConfig",),
    "nn.layers": ("Dense",),
    "nn.mask": ("Mask",),
    "nn.functional": ("dot_product_attention",),
    "nn.softmax": ("clipped_softmax", "softmax"),
    "nn.softmax_config": ("SoftmaxConfig", "make_softmax"),
    "config": ("default_config",),
    "errors": ("UserError",),
    "interop": ("from_state_dict", "to_state_dict"),
    "checkpoint.load": ("load",),
    "onnx.write": ("to_onnx",),
    "pretrained.folder": ("from_pretrained",),
    "pretrained.write": ("to_huggingface",),
    "models.build": ("build_model", "with_quant"),
    "models.losses": ("token_scores",),
    "ptq.int8": ("to_int8",),
    "ptq.calibrate": ("calibrate",),
    "quantization.sites": ("Site",),
    "quantization.spec": ("QuantSpec",),
    "quantization.tensor": ("values",),
    "evaluation.any_model": ("evaluate",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
