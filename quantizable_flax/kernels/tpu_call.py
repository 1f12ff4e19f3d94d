"""Runs a Pallas kernel for TPUs: its grid, the blocks of its arrays, and its cost for XLA."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quantizable_flax.kernels.scheme import Extras
from quantizable_flax.kernels.tpu_plan import Plan

# Tests on a CPU interpret the kernels; to compile them for it is an error.
_INTERPRET = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreting(how: Any = True) -> Iterator[None]:
    """Kernels traced inside are interpreted, on any backend: True or `pltpu.InterpretParams`."""
    token = _INTERPRET.set(how)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


Index = Callable[..., Any]  # of the two last grid axes and the scalars


@dataclasses.dataclass(frozen=True)
class Specs:
    """Blocks of arrays in a grid (batch, heads, one, other); `query` and `key` tell which."""

    plan: Plan
    query: Index
    key: Index

    def queries(self) -> pl.BlockSpec:
        """Of q and what has its shape."""
        shape = (1, self.plan.block_q, self.plan.tiles * self.plan.lanes)
        return pl.BlockSpec(shape, lambda b, h, i, j, ref: (b, self.query(i, j, ref), h))

    def keys(self, key: Index | None = None) -> pl.BlockSpec:
        """Of k and v and what has their shape."""
        key = key or self.key
        shape = (1, self.plan.block_k, self.plan.tiles * self.plan.lanes)
        return pl.BlockSpec(shape, lambda b, h, i, j, ref: (b, key(i, j, ref), h))

    def rows(self) -> pl.BlockSpec:
        """Of numbers of rows of scores, [B, heads, 1, T]."""
        shape = (1, self.plan.step_heads, 1, self.plan.block_q)
        return pl.BlockSpec(shape, lambda b, h, i, j, ref: (b, h, 0, self.query(i, j, ref)))

    def ids_and_sink(self, extras: Extras) -> tuple[pl.BlockSpec | None, ...]:
        """Of what `ids_and_sink` returns."""
        ids: tuple[pl.BlockSpec | None, ...] = (None, None)
        if extras.query_ids is not None:
            ids = (
                pl.BlockSpec(
                    (1, 1, self.plan.block_q),
                    lambda b, h, i, j, ref: (b, 0, self.query(i, j, ref)),
                ),
                pl.BlockSpec(
                    (1, 1, self.plan.block_k), lambda b, h, i, j, ref: (b, 0, self.key(i, j, ref))
                ),
            )
        sink = None if extras.sink is None else pl.BlockSpec(memory_space=pltpu.SMEM)
        return (*ids, sink)


def call(
    kernel: Callable[..., None],
    plan: Plan,
    operands: tuple[Any, ...],
    in_specs: list[Any],
    outputs: list[tuple[Any, Any]],
    *,
    name: str,
    grid: tuple[int, ...],
    products: float,
    scratch: tuple[Any, ...] = (),
    carries: int = 1,
) -> Any:
    """Runs a kernel over a grid.

    Args:
      kernel: of refs of the scalars, the other operands, the outputs and the scratch.
      plan: its sizes.
      operands, in_specs: the scalars first, which have no specification.
      outputs: shape and specification of each, or (None, None).
      name: in traces and profiles.
      grid: batch, heads, and the two others.
      products: how many matrices of the size of all scores it makes or consumes.
      scratch: shapes of memory on the chip.
      carries: how many last grid axes must run in order.
    """
    semantics: Any = ("parallel",) * (4 - carries) + ("arbitrary",) * carries
    shapes = [shape for shape, _ in outputs]
    entries = plan.batch * plan.all_heads * plan.entries()
    moved = jax.tree.leaves((operands, shapes))
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * plan.head_width * products * entries),
            transcendentals=entries,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=_INTERPRET.get(),
        name=name,
    )(*operands)
