"""Quantizable Transformers in JAX/Flax: clipped softmax, gated attention, INT8 evaluation."""

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
