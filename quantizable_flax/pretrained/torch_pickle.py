"""Pickles of PyTorch, read by a machine that can run nothing.

A pickle is a program: it may name any function of any module and call it. This machine knows the
names of `torch_names.TABLE`, each of which is a small function there, and stops at any other.
"""

import functools
import pickle
import struct
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.torch_names import TABLE, Storage, called, check_counts, table


class Loaded(NamedTuple):
    """What a pickle holds.

    Attributes:
      value: numbers, texts, tuples, lists, dicts and Tensors; None for other values that are known.
      end: where the pickle ends.
      storages: the type of numbers of each storage that it refers to, by key.
    """

    value: Any
    end: int
    storages: dict[str, np.dtype]


def load(data: bytes | mmap, start: int, path: Path) -> Loaded:
    """Returns what a pickle holds.

    Args:
      data: bytes with a pickle in them.
      start: where it begins.
      path: the file, for messages.

    Raises:
      UserError: it names something that is not in the table; nothing has run then.
      Exception: of any kind, it is damaged.
    """
    machine = _Machine(data, start, path)
    while (code := machine.take(1)) != pickle.STOP:
        if code not in _STEPS:
            raise ValueError(f"unknown opcode {code!r}")
        _STEPS[code](machine)
    return Loaded(machine.stack.pop(), machine.position, machine.storages)


class _Machine:
    """The stack, the marks and the memo of a pickle that is being read."""

    def __init__(self, data: bytes | mmap, position: int, path: Path):
        self.data, self.position, self.path = data, position, path
        self.stack = list[Any]()
        self.marks = list[int]()
        self.memo = dict[int, Any]()
        self.storages = dict[str, np.dtype]()

    def take(self, count: int) -> bytes:
        """The next bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) != count:
            raise ValueError("a pickle ends early")
        self.position += count
        return taken

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise ValueError("a pickle ends early")
        return self.take(end + 1 - self.position)[:-1].decode()

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise ValueError("a pickle takes what it has not put")
        del self.stack[-count:]
        return items

    def name(self, module: Any, name: Any) -> None:
        """Puts what the table has under a name."""
        whole = f"{module}.{name}"
        if whole not in TABLE:
            raise UserError(
                f"expected weights only in {self.path}, found that the file asks to run "
                f"{ascii(whole)[1:-1][:100]}, so nothing of it was run; save model.state_dict() "
                "alone, and do not open a file of strangers that asks for more"
            )
        self.push(TABLE[whole])

    def call(self) -> None:
        known, arguments = self.pop(2)
        self.push(called(known, arguments))

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items belong into a list")
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items with keys belong into a dict")
        self.stack[-1].update(table(zip(items[::2], items[1::2], strict=True)))

    def build(self) -> None:
        """Leaves away attributes: of a state dict, versions of its modules."""
        self.pop(1)
        if not isinstance(self.stack[-1], dict):
            raise TypeError("attributes belong to a state dict")

    def stored(self) -> None:
        (identity,) = self.pop(1)
        kind, known, key, _, numel, *view = identity
        if kind not in ("storage", b"storage") or known.dtype is None:
            raise ValueError("a pickle refers to something else than a storage")
        start = 0
        if view and view[0] is not None:  # of files before PyTorch 0.4
            _, start, numel = view[0]
        check_counts(start, numel)
        self.storages[str(key)] = known.dtype
        self.push(Storage(str(key), known.dtype, start, numel))


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _number(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(form))


def _sized(form: str, read: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(read(machine.take(machine.number(form))))


def _tuple(count: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(tuple(machine.pop(count)))


def _get(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.memo[machine.number(form)])


def _put(form: str) -> Callable[[_Machine], None]:
    # By number: Python's own reader makes a list as long as the highest of them, which is 32 bits.
    return lambda machine: machine.memo.update({machine.number(form): machine.stack[-1]})


_text, _long = bytes.decode, functools.partial(int.from_bytes, byteorder="little", signed=True)
# What PyTorch writes: protocol 2, and 3 to 5 where somebody asked for them.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine.skip(1),
    pickle.FRAME: lambda machine: machine.skip(8),
    pickle.NONE: _push(None),
    pickle.NEWTRUE: _push(True),
    pickle.NEWFALSE: _push(False),
    pickle.BININT: _number("<i"),
    pickle.BININT1: _number("<B"),
    pickle.BININT2: _number("<H"),
    pickle.BINFLOAT: _number(">d"),
    pickle.LONG1: _sized("<B", _long),
    pickle.LONG4: _sized("<I", _long),
    pickle.BINUNICODE: _sized("<I", _text),
    pickle.BINUNICODE8: _sized("<Q", _text),
    pickle.SHORT_BINUNICODE: _sized("<B", _text),
    pickle.BINSTRING: _sized("<I", _text),  # of Python 2
    pickle.SHORT_BINSTRING: _sized("<B", _text),
    pickle.BINBYTES: _sized("<I", bytes),
    pickle.BINBYTES8: _sized("<Q", bytes),
    pickle.SHORT_BINBYTES: _sized("<B", bytes),
    pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
    pickle.EMPTY_TUPLE: _push(()),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.since_mark())),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.APPEND: lambda machine: machine.append(machine.pop(1)),
    pickle.APPENDS: lambda machine: machine.append(machine.since_mark()),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.SETITEM: lambda machine: machine.set(machine.pop(2)),
    pickle.SETITEMS: lambda machine: machine.set(machine.since_mark()),
    pickle.BINPUT: _put("<B"),
    pickle.LONG_BINPUT: _put("<I"),
    pickle.MEMOIZE: lambda machine: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    pickle.BINGET: _get("<B"),
    pickle.LONG_BINGET: _get("<I"),
    pickle.GLOBAL: lambda machine: machine.name(machine.line(), machine.line()),
    pickle.STACK_GLOBAL: lambda machine: machine.name(*machine.pop(2)),
    pickle.REDUCE: lambda machine: machine.call(),
    pickle.BUILD: lambda machine: machine.build(),
    pickle.BINPERSID: lambda machine: machine.stored(),
}
