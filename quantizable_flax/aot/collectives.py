"""What a compiled program sends between devices, by kind of collective.

With n devices in a group and a buffer of S bytes, a device sends in a ring (Thakur et al., 2005,
"Optimization of collective communication operations in MPICH"; the same count holds on a torus)

    all-gather          (n - 1) / n * S      S: the gathered result
    reduce-scatter      (n - 1) / n * S      S: the operand, n times the result
    all-reduce          2 (n - 1) / n * S    a reduce-scatter, then an all-gather
    all-to-all          (n - 1) / n * S      S: all pieces of a device
    collective-permute  S

Shorter routes of an all-to-all on a torus, and padding of tiled layouts, are not considered.
"""

import math
import re
from typing import NamedTuple

from quantizable_flax.aot.hlo import Computation, Instruction, Program, Shape

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPCODES = {
    **{kind: kind for kind in KINDS},
    **{f"{kind}-start": kind for kind in KINDS},
    "ragged-all-to-all": "all-to-all",
}


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of KINDS.
      shapes: of the whole buffer: what is reduced, gathered or exchanged.
      group: devices that take part together.
      times: how often it runs in one call of the program.
      op_name: where in the model it comes from, as JAX names it; may be empty.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    times: int
    op_name: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one call of the program."""
        size, n = sum(shape.bytes for shape in self.shapes), self.group
        if self.kind == "collective-permute":
            return float(size * self.times)
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n * size * self.times

    @property
    def in_words(self) -> str:
        """Bytes, the largest array, the group, and the end of `op_name`."""
        array = max(self.shapes, key=lambda shape: shape.bytes)
        more = f" and {len(self.shapes) - 1} more" if len(self.shapes) > 1 else ""
        dims = ",".join(map(str, array.dims))
        place = "/".join(self.op_name.split("/")[-3:])
        return (
            f"{self.wire_bytes / 1e6:.4g} MB {self.kind} of {array.dtype}[{dims}]{more} among "
            f"{self.group}, {self.times} times {place}"
        ).rstrip()


def collectives_of(program: Program, devices: int) -> list[Collective]:
    """Returns the collectives of a program, each once, those among single devices left out.

    Args:
      program: as `hlo.parse` reads it.
      devices: of the whole program, the group where none is written.
    """
    found, chains = [], set()
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            kind = _OPCODES.get(instruction.opcode)
            times = program.times[computation.name]
            if kind is None or not times:
                continue
            # Overlapped with computation, a TPU's collective shows in each fusion that it spans.
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            if chain is not None:
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = (chain[1], channel and channel[1])
                if key in chains:
                    continue
                chains.add(key)
            one = _collective(kind, instruction, computation, devices, times)
            if one.group > 1:
                found.append(one)
    return found


def by_kind(collectives: list[Collective]) -> dict[str, float]:
    """Returns the bytes that a device sends by kind, those of KINDS that occur."""
    sums = {kind: sum(c.wire_bytes for c in collectives if c.kind == kind) for kind in KINDS}
    return {kind: size for kind, size in sums.items() if size}


def _collective(
    kind: str, instruction: Instruction, around: Computation, devices: int, times: int
) -> Collective:
    group, shapes = group_size(instruction.attributes, devices), instruction.shapes
    if kind == "collective-permute":
        group = 2 if re.search(r"source_target_pairs=\{\{", instruction.attributes) else 1
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        shapes = _results(instruction, kind)
    if kind == "reduce-scatter":
        shapes = tuple(Shape(s.dtype, (group, *s.dims), s.space) for s in shapes)
    # A TPU's reduce-scatter is a fusion around an all-reduce of which each device keeps a part.
    if kind == "all-reduce" and "all-reduce-scatter" in around.name:
        kind = "reduce-scatter"
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, shapes, group, times, name[1] if name else "")


def _results(instruction: Instruction, kind: str) -> tuple[Shape, ...]:
    """Of (operands, results, contexts), which a `-start` returns, the results."""
    count = len(instruction.operands)
    arrays = instruction.shapes[: 2 * count]
    return arrays[count:] if len(arrays) == 2 * count else arrays


def group_size(attributes: str, devices: int) -> int:
    """Returns the devices of a replica group, in any of the ways that XLA writes groups.

    They are `{{0,1},{2,3}}`, `[2,128]<=[256]` (2 groups of 128) and
    `mesh['x'=4,'y'=2] {'x'}` (the axes that a group spans).
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis may be given in part, as 'x':(before)size.
        spans = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in spans)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota is not None:
        return int(iota[1].split(",")[-1])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return groups[1].count(",") + 1 if groups is not None and groups[1] else devices
