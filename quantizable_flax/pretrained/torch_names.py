"""The names that a pickle of PyTorch may use, and what they stand for here: tables and numbers."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Storage(NamedTuple):
    """A run of bytes that tensors share.

    Attributes:
      key: its name in the file.
      dtype: of its elements.
      start: the element of the stored bytes at which it begins.
      numel: the number of its elements.
    """

    key: str
    dtype: np.dtype
    start: int
    numel: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements of dtype."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Known(NamedTuple):
    """What a name of the table stands for: a function of ours, a type of numbers, or neither."""

    call: Callable[..., Any] | None = None
    dtype: np.dtype | None = None


def called(known: Any, arguments: Any) -> Any:
    """Returns what a function of the table makes; raises TypeError for anything else."""
    if not isinstance(known, Known) or known.call is None or not isinstance(arguments, tuple):
        raise TypeError("a pickle calls something that is no function")
    return known.call(*arguments)


def check_counts(*numbers: Any) -> None:
    """Raises ValueError unless all are natural numbers."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("sizes, strides and offsets should be natural numbers")


def table(items: Iterable[Any] = ()) -> dict[Any, Any]:
    """Returns a dict of pairs; raises TypeError for keys that are no names or numbers."""
    made = {}
    for key, value in items:
        # To hash a deep nest of tuples would overflow the stack of the interpreter.
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError("keys should be names")
        made[key] = value
    return made


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """As _rebuild_tensor and, with gradients, hooks and perhaps bits to apply, v2."""
    if len(rest) > 2 and rest[2] and any(rest[2].values()):
        raise ValueError("a tensor is to be negated or conjugated")
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise TypeError("a tensor needs a storage and as many strides as sizes")
    check_counts(offset, *shape, *strides)
    return Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_of_type(*arguments: Any) -> Tensor:
    """As _rebuild_tensor_v3: the storage is of bytes, the type stands beside it."""
    *others, known = arguments[:7]
    if known.dtype is None:
        raise TypeError("a tensor needs a type")
    return _tensor(*others, *arguments[7:])._replace(dtype=known.dtype)


def _nothing(*_: Any) -> None:
    """Stands for values that are no tensors."""


_NUMBERS = {
    **{name: getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
    **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128")},
    **{name: name for name in ("bool", "int8", "int16", "int32", "int64")},
    **{name: name for name in ("uint8", "uint16", "uint32", "uint64")},
}
_STORAGES = {
    **{"Half": "float16", "BFloat16": ml_dtypes.bfloat16, "Float": "float32", "Double": "float64"},
    **{"Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32"},
    **{"Long": "int64", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
}
TABLE = {
    "collections.OrderedDict": Known(table),
    "torch._utils._rebuild_tensor": Known(_tensor),
    "torch._utils._rebuild_tensor_v2": Known(_tensor),
    "torch._utils._rebuild_tensor_v3": Known(_tensor_of_type),
    "torch._utils._rebuild_parameter": Known(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": Known(lambda tensor, *_: tensor),
    "torch._tensor._rebuild_from_type_v2": Known(lambda known, _, args, *__: called(known, args)),
    "torch.Size": Known(tuple),
    "torch.Tensor": Known(),
    "torch.nn.parameter.Parameter": Known(),
    "torch.storage.UntypedStorage": Known(dtype=np.dtype("uint8")),
    "torch.device": Known(_nothing),
    "_codecs.encode": Known(_nothing),  # bytes
    **{f"torch.{name}": Known(dtype=np.dtype(kind)) for name, kind in _NUMBERS.items()},
    **{f"torch.{name}Storage": Known(dtype=np.dtype(kind)) for name, kind in _STORAGES.items()},
}
for _module in ("builtins", "__builtin__"):
    TABLE |= {f"{_module}.{name}": Known(_nothing) for name in ("set", "bytearray", "complex")}
