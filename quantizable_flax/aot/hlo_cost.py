"""FLOPs of the matrix units and traffic with HBM of a compiled program, loops in full.

Products (`dot`, and `convolution`, which is what a TPU makes of them) count 2 FLOPs for each
multiply-add that is not with padding, as in XLA's cost analysis; a kernel counts what it states. An
instruction outside of fusions reads its operands from HBM and writes its result there, but for
arrays that the compiler has put into another memory (VMEM); of what is only sliced or gathered the
slices count, of an update in place the update.
"""

import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from quantizable_flax.aot.hlo import Computation, Instruction, Program, Shape

_SLICES = ("dynamic-slice", "slice", "gather")
# Nothing moves, or what moves is counted elsewhere: inside a loop, or where a copy starts.
_FREE = {
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"),
    *("while", "conditional", "call", "async-update"),
}


def matrix_flops(program: Program) -> float:
    """Returns the FLOPs of all products in one call of the program."""
    total = 0.0
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                products = _dot if instruction.opcode == "dot" else _convolution
                operands = [_shape(name, computation) for name in instruction.operands[:2]]
                flops = 2.0 * products(instruction, *operands)
                total += program.times[computation.name] * flops
            elif instruction.opcode == "custom-call":
                total += program.times[computation.name] * _estimate(instruction)
    return total


def hbm_bytes(program: Program) -> float:
    """Returns the bytes read from and written to HBM in one call of the program, an estimate."""
    return float(
        sum(
            program.times[computation.name] * _traffic(instruction, computation, program)
            for computation in program.computations.values()
            if computation.name not in program.fused and program.times[computation.name]
            for instruction in computation.instructions.values()
        )
    )


def _estimate(call: Instruction) -> float:
    """FLOPs that a Pallas kernel states of itself (`pl.CostEstimate`), 0 for other custom calls."""
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', call.attributes)
    return float(stated[1]) if stated else 0.0


def _shape(name: str, around: Computation) -> Shape:
    return around.instructions[name].shapes[0]


def _dot(instruction: Instruction, left: Shape, _: Shape) -> int:
    named = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in re.findall(r"\d+", named[1])] if named else []
    return instruction.shapes[0].elements * math.prod(left.dims[axis] for axis in axes)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> int:
    """Multiply-adds: output features and examples, times inputs and the window's valid places."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    output, count = instruction.shapes[0], 1
    window = _window(instruction.attributes, sum(label.isdigit() for label in labels[1]))
    for axis, (size, stride, low, left_dilation, right_dilation) in enumerate(window):
        extent = output.dims[labels[3].index(str(axis))]
        places = left.dims[labels[1].index(str(axis))]
        count *= _valid(extent, size, stride, low, places, left_dilation, right_dilation)
    features = output.dims[labels[3].index("f")] * output.dims[labels[3].index("b")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    inputs = right.dims[labels[2].index("i")]
    return features * inputs * count // (int(groups[1]) if groups else 1)


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """(size, stride, padding before, dilation of the input, of the window) by spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}

    def values(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * axes

    rows = zip(
        values("size", "1"),
        values("stride", "1"),
        (pad.split("_")[0] for pad in values("pad", "0_0")),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    return [(int(a), int(b), int(c), int(d), int(e)) for a, b, c, d, e in rows]


@functools.lru_cache(maxsize=4096)
def _valid(
    extent: int, size: int, stride: int, low: int, places: int, left_step: int, right_step: int
) -> int:
    """Pairs of an output and a window place that meet an input and not padding or a hole."""
    count = 0
    starts = np.arange(extent) * stride - low
    for place in range(size):
        at = starts + place * right_step
        inside = (at >= 0) & (at <= (places - 1) * left_step)
        count += int(np.count_nonzero(inside & (at % left_step == 0)))
    return count


def _traffic(instruction: Instruction, around: Computation, program: Program) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode in ("copy-start", "slice-start"):  # source and destination, in either order
        ends = instruction.shapes[:2]
        return min(shape.bytes for shape in ends) * sum(shape.space == 0 for shape in ends)
    if opcode.endswith("-start"):  # (operands, results, contexts)
        return _in_hbm(instruction.shapes)
    if opcode == "fusion":
        return _fusion_traffic(instruction, around, program)
    operands = [around.instructions[name] for name in instruction.operands]
    if opcode in _SLICES:
        moved = sum(shape.bytes for shape in instruction.shapes)
        return _of(operands[0], moved) + _in_hbm(instruction.shapes)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else -1]
        moved = sum(shape.bytes for shape in update.shapes)
        # A scatter adds to what it reads.
        reads = 2 if opcode == "scatter" else 1
        return _in_hbm(update.shapes) + reads * _of(operands[0], moved)
    return _in_hbm(instruction.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)


def _fusion_traffic(instruction: Instruction, around: Computation, program: Program) -> int:
    name = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
    inside = program.computations[name[1]] if name else None
    operands = [around.instructions[operand] for operand in instruction.operands]
    if inside is None:
        return _in_hbm(instruction.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)
    users = _users(inside)
    total = _written(instruction, inside)
    for parameter in inside.instructions.values():
        if parameter.opcode != "parameter":
            continue
        operand = operands[int(parameter.arguments)]
        whole = sum(shape.bytes for shape in operand.shapes)
        total += _of(operand, min(whole, _read(parameter.name, users, whole)))
    return total


def _users(computation: Computation) -> dict[str, list[tuple[Instruction, int]]]:
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for instruction in computation.instructions.values():
        for place, operand in enumerate(instruction.operands):
            users.setdefault(operand, []).append((instruction, place))
    return users


def _read(name: str, users: dict[str, list[tuple[Instruction, int]]], whole: int) -> int:
    """Bytes of a fusion's parameter that are read: slices of it, or all."""
    total = 0
    for user, place in users.get(name, []):
        if user.opcode == "bitcast":
            total += _read(user.name, users, whole)
        elif user.opcode in _SLICES and place == 0:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        else:
            return whole
    return total


def _written(fusion: Instruction, inside: Computation) -> int:
    """Bytes of a fusion's results, of those that are updated in place the update."""
    total = 0
    root = inside.root
    leaves = [inside.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(leaves) != len(fusion.shapes):
        return _in_hbm(fusion.shapes)
    for shape, leaf in zip(fusion.shapes, leaves, strict=True):
        while leaf.opcode == "bitcast":
            leaf = inside.instructions[leaf.operands[0]]
        if leaf.opcode == "dynamic-update-slice":
            update = inside.instructions[leaf.operands[1]]
            total += sum(s.bytes for s in update.shapes) if shape.space == 0 else 0
        else:
            total += _in_hbm([shape])
    return total


def _in_hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _of(operand: Instruction, moved: int) -> int:
    """`moved` bytes of an operand, none where it lies elsewhere."""
    return moved if any(shape.space == 0 for shape in operand.shapes) else 0
