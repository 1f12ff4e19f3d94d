"""What the Hopper kernels of `gpu_forward` and `gpu_backward` share.

A block of the grid has two warpgroups that compute, each on `ROWS` rows of its own, and one that
does nothing but copy the blocks which both look at into a ring of buffers in shared memory.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from quantizable_flax.kernels.scheme import Scheme

ROWS = 64  # of one warpgroup, what its matrix instruction takes
WARPGROUPS = 2  # that compute
TILE = ROWS * WARPGROUPS
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # of a thread; 65536 are there for all

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)  # vectors along rows and columns

# JAX 0.10 asks for an index, later ones warn of it or have none.
_IDX = inspect.signature(plgpu.load).parameters.get("idx")
_INDEX: tuple = ((),) if _IDX is not None and _IDX.default is inspect.Parameter.empty else ()


class Rows(NamedTuple):
    """Numbers of queries and keys beside q, k and v, padded to whole tiles; None where not needed.

    Attributes:
      query_ids, key_ids: int32 [B, T'] and [B, S'], of what is padded HIDDEN.
      words: uint32 [B, H, T'] twice, from which dropout draws.
      sink: float32 [H].
      offset: int32 [1], the place of the first query, where queries see the keys up to themselves.
    """

    query_ids: Any = None
    key_ids: Any = None
    words: Any = None
    sink: Any = None
    offset: Any = None

    def query_offset(self) -> jax.Array:
        """The place of the first query, inside a kernel."""
        return jnp.int32(0) if self.offset is None else self.offset[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of a kernel: [batch, queries or keys, heads, width]."""

    scheme: Scheme
    batch: int
    queries: int
    keys: int
    heads: int
    width: int

    @property
    def padded_queries(self) -> int:
        """Queries in whole tiles."""
        return pl.cdiv(self.queries, TILE) * TILE

    @property
    def keep(self) -> float:
        """How much of the probabilities dropout keeps."""
        return 1.0 - self.scheme.dropout_rate

    @property
    def stretch(self) -> float:
        """The gradient of a weight by its probability, where it is neither clipped nor dropped."""
        return (self.scheme.zeta - self.scheme.gamma) / self.keep


class Here(NamedTuple):
    """Which part of the work this warpgroup has."""

    tile: jax.Array
    head: jax.Array
    batch: jax.Array
    warpgroup: jax.Array

    @property
    def first(self) -> jax.Array:
        """The first of its rows."""
        return self.tile * TILE + self.warpgroup * ROWS

    def rows(self, ref: Any) -> Any:
        """Its part of [B, T, H, K]."""
        return ref.at[self.batch, pl.ds(self.first, ROWS), self.head]

    def block(self, ref: Any, start: jax.Array, size: int) -> Any:
        """Part of [B, T, H, K], of [B, H, T'] or of [B, T'], of its head and batch row."""
        where = pl.ds(start, size)
        if len(ref.shape) == 4:
            return ref.at[self.batch, where, self.head]
        return (
            ref.at[self.batch, self.head, where]
            if len(ref.shape) == 3
            else ref.at[self.batch, where]
        )

    def vector(self, ref: Any) -> jax.Array | None:
        """Its part of [B, H, T'] or [B, T'] along the rows, in registers."""
        if ref is None:
            return None
        return load(self.block(ref, self.first, ROWS), BY_ROW, optimized=False)


def launch(kernel: Any, tiles: int, plan: Plan, out_type: Any, scratch: Any) -> Any:
    """`kernel(here, *inputs, *outputs, scratch)` -> what runs it on tiles by heads by batch."""

    def body(*refs: Any) -> None:
        names = ("tile", "head", "batch", "warpgroup")
        kernel(Here(*(jax.lax.axis_index(name) for name in names)), *refs)

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        grid=(tiles, plan.heads, plan.batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
    )


def by_role(here: Here, copy: Any, compute: Any) -> None:
    """Runs `copy` in the last warpgroup and `compute` in the others, with registers to match."""

    @pl.when(here.warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()

    @pl.when(here.warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute()


def tiled(*shape: int) -> Any:
    """bfloat16 in shared memory, in the order that the matrix instruction reads."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


class Ring(NamedTuple):
    """Buffers of shared memory [stages, ...] that one warpgroup fills and the others empty."""

    buffers: Any
    ready: Any
    free: Any

    @staticmethod
    def scratch(stages: int, *buffers: Any) -> "Ring":
        """What to allocate; `buffers` are types with a first axis of `stages`."""
        ready = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        return Ring(list(buffers), ready, free)

    @property
    def stages(self) -> int:
        """How many steps lie in shared memory at a time."""
        return self.buffers[0].shape[0]

    def slot(self, step: jax.Array) -> jax.Array:
        """Which buffer a step uses."""
        return jax.lax.rem(step, jnp.int32(self.stages))

    def fill(self, step: jax.Array, sources: Sequence[Any]) -> None:
        """Copies `sources`, once the step that used their buffers before is done with."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def _wait() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.ready.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """Waits until all `steps` are done with, so that no barrier is left half used."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _wait(step: jax.Array) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

    def take(self, step: jax.Array) -> list[Any]:
        """The buffers of a step, waited for."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, step: jax.Array) -> None:
        """Says that this warpgroup has read the buffers of a step.

        What it read into registers itself, and not the matrix unit, must be ordered before the
        next copy.
        """
        if any(buffer.dtype != jnp.bfloat16 for buffer in self.buffers):
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """A vector from memory into registers."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=optimized)


def store(results: Sequence[tuple[jax.Array, Any, Any]]) -> None:
    """Writes (values, their buffer, where to) and waits."""
    for values, buffer, _ in results:
        buffer[...] = values.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, ref in results:
        plgpu.copy_smem_to_gmem(buffer, ref)
    plgpu.wait_smem_to_gmem(0)


def products(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """`x y^T` of blocks in shared memory, float32, waited for together."""

    def multiply(*totals: Any) -> list[jax.Array]:
        for total, (x, y) in zip(totals, pairs, strict=True):
            plgpu.wgmma(total, x, y.T)
        return [total[...] for total in totals]

    return pl.run_scoped(multiply, *(accumulator(x.shape[0], y.shape[0]) for x, y in pairs))


def accumulator(rows: int, columns: int) -> Any:
    """Zeros in registers that a matrix instruction adds to."""
    return plgpu.ACC((rows, columns), jnp.float32)


def full(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    """A constant in registers, float32."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
