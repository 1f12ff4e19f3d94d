"""Quantizable Transformers in JAX/Flax: clipped softmax, gated attention, INT8 evaluation.

Names are imported when they are first used: the attention alone needs jax, flax and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantizable_flax.attention.attention import MultiHeadAttention
    from quantizable_flax.attention.drop_in import attention_fn
    from quantizable_flax.attention.gate import GateConfig
    from quantizable_flax.attention.softmax import clipped_softmax, make_softmax, softmax
    from quantizable_flax.config import default_config
    from quantizable_flax.errors import UserError
    from quantizable_flax.interop import from_state_dict
    from quantizable_flax.loading import load
    from quantizable_flax.models.registry import build_model, with_quant
    from quantizable_flax.ptq.int8 import to_int8
    from quantizable_flax.quantization.calibration import calibrate
    from quantizable_flax.quantization.spec import QuantSpec

__all__ = [
    "GateConfig",
    "MultiHeadAttention",
    "QuantSpec",
    "UserError",
    "attention_fn",
    "build_model",
    "calibrate",
    "clipped_softmax",
    "default_config",
    "from_state_dict",
    "load",
    "make_softmax",
    "softmax",
    "to_int8",
    "with_quant",
]

_MODULES = {
    "attention.attention": ("MultiHeadAttention",),
    "attention.drop_in": ("attention_fn",),
    "attention.gate": ("GateConfig",),
    "attention.softmax": ("clipped_softmax", "make_softmax", "softmax"),
    "config": ("default_config",),
    "errors": ("UserError",),
    "interop": ("from_state_dict",),
    "loading": ("load",),
    "models.registry": ("build_model", "with_quant"),
    "ptq.int8": ("to_int8",),
    "quantization.calibration": ("calibrate",),
    "quantization.spec": ("QuantSpec",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
