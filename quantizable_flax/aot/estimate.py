"""What a compiled training step asks of its chip, and the least time that it can take."""

import dataclasses
from typing import Any

import jax

from quantizable_flax.aot import collectives, hlo, hlo_cost
from quantizable_flax.runtime.chips import Chip

ASSUMPTIONS = (
    "Everything is for one device and one step; the program was compiled ahead of time and not "
    "executed.",
    "FLOPs: those of matrix products in the compiled program, loops in full, at the bfloat16 peak "
    "(float32 products run as bfloat16 passes on a TPU at the default precision, one pass each).",
    "HBM traffic: operands and results of the compiled instructions, but for what stays in VMEM, "
    "at the full bandwidth.",
    "Interconnect: bytes that a device sends by the ring algorithms, over all links of a chip at "
    "once.",
    "The bound is the largest of the three times, as if they overlapped fully; a step without "
    "any overlap takes their sum. A real step takes longer, as far as the HBM traffic is estimated "
    "well.",
)

LARGEST = 5


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of a compiled program for one device and one call.

    Attributes:
      arguments, outputs, aliased, temporaries, code: bytes of HBM; `aliased` are outputs that
        take the place of arguments.
      flops: of matrix products, loops in full.
      reported_flops: by XLA's cost analysis, elementwise work too, loops for one pass.
      hbm_bytes: read and written, an estimate.
      wire_bytes: sent, by kind of collective.
      largest: the collectives that send the most, each in a few words.
      unknown_loops: loops counted for one pass because their number is not known.
      seconds: that the compilation took.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    reported_flops: float
    hbm_bytes: float
    wire_bytes: dict[str, float]
    largest: tuple[str, ...]
    unknown_loops: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of HBM that the program takes while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def measure(compiled: jax.stages.Compiled, devices: int, seconds: float) -> Compiled:
    """Returns the figures of a program compiled for so many devices."""
    memory: Any = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text() or "")
    costs: Any = compiled.cost_analysis()
    sent = collectives.collectives_of(program, devices)
    largest = sorted(sent, key=lambda one: -one.wire_bytes)[:LARGEST]
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=hlo_cost.matrix_flops(program),
        reported_flops=costs.get("flops", 0.0),
        hbm_bytes=hlo_cost.hbm_bytes(program),
        wire_bytes=collectives.by_kind(sent),
        largest=tuple(one.in_words for one in largest),
        unknown_loops=program.unknown_loops,
        seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One candidate: what it is, and what its compiled step would take.

    Attributes:
      topology, settings: of the candidate.
      chip: of the topology.
      devices: how many.
      mesh: sizes of the mesh axes.
      batch_size: examples of a step, on all devices.
      tokens: of an example; 0 for images.
      model_flops: of a step by formula, for one device.
      waiting: bytes of the batches that lie on a device ahead of the step.
      compiled: None where the candidate cannot work.
      reason: why it cannot, or an empty string.
    """

    topology: str
    settings: dict[str, str]
    chip: Chip
    devices: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_size: int = 0
    tokens: int = 0
    model_flops: float = 0.0
    waiting: int = 0
    compiled: Compiled | None = None
    reason: str = ""

    @property
    def peak(self) -> int:
        """Bytes of HBM that are taken while a step runs; 0 without a program."""
        return 0 if self.compiled is None else self.compiled.peak + self.waiting

    @property
    def fits(self) -> bool:
        """Whether the step runs in the memory of the chip."""
        return self.compiled is not None and self.peak <= self.chip.hbm_bytes

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step by what limits it; empty without a program."""
        if self.compiled is None:
            return {}
        return {
            "compute": self.compiled.flops / self.chip.bf16_flops,
            "HBM": self.compiled.hbm_bytes / self.chip.hbm_bandwidth,
            "interconnect": sum(self.compiled.wire_bytes.values()) / self.chip.link_bandwidth,
        }

    @property
    def bound(self) -> float:
        """The least seconds of a step."""
        return max(self.times.values())

    @property
    def limit(self) -> str:
        """Which of `times` is the largest."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def examples_per_second(self) -> float:
        """The most examples in a second on all devices."""
        return self.batch_size / self.bound

    @property
    def utilisation(self) -> float:
        """Model FLOPs over the peak (MFU) of a step that takes `bound`."""
        return self.model_flops / (self.bound * self.chip.bf16_flops)

    def as_json(self) -> dict[str, Any]:
        """Returns fields and derived values, sizes in bytes, times in seconds."""
        values = dataclasses.asdict(self) | {"chip": self.chip.name, "fits": self.fits}
        if self.compiled is not None:
            values |= {
                "peak": self.peak,
                "seconds": self.times,
                "bound_seconds": self.bound,
                "limit": self.limit,
                "examples_per_second": self.examples_per_second,
                "utilisation": self.utilisation,
            }
        return values
