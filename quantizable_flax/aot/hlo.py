"""Compiled programs read from their text: instructions, shapes, and how often each part runs.

XLA's own cost analysis takes the body of a loop for one pass and is silent about the interconnect,
so the accounting of `collectives.py` and `hlo_cost.py` starts from the text.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

# One byte or more; smaller types are packed.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\(")
_CONTROL = ("while", "call", "conditional", "async-start")  # others hold what they call inside
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations|\w+_computation)=")


class Shape(NamedTuple):
    """An array of a program: element type, dimensions, and 0 for HBM or another memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of a tiled layout."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return -(-self.elements * bits // 8)


class Instruction(NamedTuple):
    """One line of a program; `shapes` are the leaves of what it returns."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str  # between the parentheses
    attributes: str  # behind them
    is_root: bool


@dataclasses.dataclass
class Computation:
    """A function of a program, its instructions by name in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in reversed(self.instructions.values()) if i.is_root)


@dataclasses.dataclass
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      times: by name, how often a computation runs in one call of the program.
      fused: computations inside an instruction (fusions, reducers): their values stay on the chip.
      unknown_loops: loops whose number of passes the text does not tell; counted as one pass.
    """

    computations: dict[str, Computation]
    times: dict[str, int]
    fused: set[str]
    unknown_loops: int


def parse(text: str) -> Program:
    """Returns the program that `jax.stages.Compiled.as_text` gives."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head is not None:
                current = Computation(head[2], {})
                computations[head[2]] = current
                entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        else:
            found = _instruction(line)
            if found is not None:
                current.instructions[found.name] = found
    return _with_times(computations, entry)


def shapes_in(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type, a tuple flattened."""
    return tuple(
        Shape(match[1], tuple(int(size) for size in re.findall(r"\d+", match[2])), _space(match[0]))
        for match in _SHAPE.finditer(text)
    )


def _space(text: str) -> int:
    found = re.search(r"S\((\d+)\)", text)
    return int(found[1]) if found else 0


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    start, depth = match.end(), 1
    end = start
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    arguments = line[start : end - 1]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(
        match[2], match[4], shapes_in(match[3]), operands, arguments, line[end:], bool(match[1])
    )


def _with_times(computations: dict[str, Computation], entry: str) -> Program:
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    fused, unknown = set(), 0
    for computation in computations.values():
        for instruction in computation.instructions.values():
            called = _called(instruction.attributes)
            if not called:
                continue
            passes = 1
            if instruction.opcode == "while":
                known = _passes(instruction, computation, computations)
                unknown += known is None
                passes = 1 if known is None else known
            for name in called:
                if name in callers:
                    callers[name].append((computation.name, passes))
                    if instruction.opcode not in _CONTROL:
                        fused.add(name)

    @functools.cache
    def times(name: str) -> int:
        if name == entry:
            return 1
        return sum(times(caller) * passes for caller, passes in callers[name])

    return Program(computations, {name: times(name) for name in computations}, fused, unknown)


def _called(attributes: str) -> list[str]:
    names: list[str] = []
    for match in _CALLED.finditer(attributes):
        rest = attributes[match.end() :]
        names += _NAME.findall(rest[: rest.index("}")] if rest[0] == "{" else rest.split(",")[0])
    return names


def _passes(
    loop: Instruction, around: Computation, computations: dict[str, Computation]
) -> int | None:
    """Passes of a loop: as annotated, or by `i < N` of its condition and `i + step` of its body."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known is not None:
        return int(known[1])
    named = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    if named is None or named[1] not in computations:
        return None
    condition = computations[named[1]]
    compare = condition.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (condition.instructions[name] for name in compare.operands)
    end, index = _constant(limit, condition), re.search(r"index=(\d+)", counter.attributes)
    if end is None or counter.opcode != "get-tuple-element" or index is None:
        return None
    carried = around.instructions.get(loop.operands[0])
    start = None
    if carried is not None and carried.opcode == "tuple":
        first = around.instructions.get(carried.operands[int(index[1])])
        start = None if first is None else _constant(first, around)
    step = _step(loop, int(index[1]), computations)
    return None if not step else max(-(-(end - (start or 0)) // step), 0)


def _step(loop: Instruction, index: int, computations: dict[str, Computation]) -> int | None:
    """What a pass adds to the counter: TPU loops that multiply and send in turns add two."""
    named = re.search(r"body=%?([\w.\-]+)", loop.attributes)
    body = computations.get(named[1]) if named else None
    if body is None or body.root.opcode != "tuple":
        return None
    following = body.instructions[body.root.operands[index]]
    while following.opcode == "copy":
        following = body.instructions[following.operands[0]]
    if following.opcode != "add":
        return None
    terms = (_constant(body.instructions[name], body) for name in following.operands)
    return next((term for term in terms if term is not None), None)


def _constant(instruction: Instruction, around: Computation) -> int | None:
    """The value of a constant integer, through copies of it."""
    while instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in (
        around.instructions
    ):
        instruction = around.instructions[instruction.operands[0]]
    found = re.fullmatch(r"\s*(-?\d+)\s*", instruction.arguments)
    return int(found[1]) if instruction.opcode == "constant" and found else None
