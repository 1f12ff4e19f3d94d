"""How an attention is laid onto a TPU: layout of its arrays, sizes of blocks, and their cost.

Arrays stay as they come, [B, T, H, K] seen as [B, T, H K], for TPUs fill the last axis up to 128
lanes: as [B, H, T, 64] they would take twice the memory and need a transposition. So a block of
128 lanes is a tile of several narrow heads.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quantizable_flax.kernels.scheme import Extras, Scheme

LANES = 128
SHEET = 2**18  # scores of a grid step
BLOCK = 512  # queries and keys of a block where rows are not whole
CAUSAL_BLOCK = 256  # of queries: smaller ones look at fewer hidden keys
WHOLE_ROWS = 2**19  # bytes of keys of a tile up to which rows of scores are whole
CAUSAL_WHOLE_ROWS = 1024  # keys; beyond, blocks that nobody sees are worth being left out

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one attention.

    Attributes:
      batch, queries, keys, heads, width: B, T, S, H and K.
      head_width: K, filled up so that heads make whole tiles.
      lanes: of a tile, which holds one head or several.
      tiles: that a grid step looks at.
      block_q, block_k: queries and keys that it looks at.
      whole_rows: whether block_k holds all keys.
      skips: whether nobody sees what lies above the diagonal.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    head_width: int
    lanes: int
    tiles: int
    block_q: int
    block_k: int
    whole_rows: bool
    skips: bool

    @property
    def tile_heads(self) -> int:
        """Heads of a tile."""
        return self.lanes // self.head_width

    @property
    def step_heads(self) -> int:
        """Heads of a grid step."""
        return self.tiles * self.tile_heads

    @property
    def all_heads(self) -> int:
        """Heads with those that fill up the last tile."""
        return _up(self.heads, self.tile_heads)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Batch rows, groups of heads, blocks of queries and of keys."""
        return (
            self.batch,
            self.all_heads // self.step_heads,
            pl.cdiv(self.queries, self.block_q),
            pl.cdiv(self.keys, self.block_k),
        )

    def prefixes(self) -> list[int]:
        """Keys that a block of queries looks at where rows are whole, by block or one for all."""
        if not self.skips:
            return [self.block_k]
        return [min(self.block_k, (i + 1) * self.block_q) for i in range(self.grid[2])]

    def entries(self) -> int:
        """Scores of one head and batch row that are computed."""
        if not self.skips:
            return self.queries * self.keys
        step = self.block_q if self.whole_rows else self.block_k
        ends = ((i + 1) * self.block_q for i in range(self.grid[2]))
        return sum(self.block_q * min(_up(self.keys, LANES), _up(end, step)) for end in ends)


def plan_of(scheme: Scheme, q: jax.Array, k: jax.Array, extras: Extras) -> Plan:
    """Sizes for q [B, T, H, K] and k [B, S, H, K]."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    # A sublane tile of bfloat16 has 16 rows, at which transposed heads are to begin.
    head_width = _up(width, LANES) if width > LANES else max(16, pl.next_power_of_2(width))
    lanes = max(LANES, head_width)
    whole_rows = _up(keys, LANES) * lanes * k.dtype.itemsize <= WHOLE_ROWS
    whole_rows &= not scheme.causal or keys <= CAUSAL_WHOLE_ROWS
    most = CAUSAL_BLOCK if scheme.causal and whole_rows else BLOCK
    block_k = _up(keys, LANES) if whole_rows else _even(keys, BLOCK)
    block_q = _even(queries, max(LANES, min(most, SHEET // block_k)))
    tiles = pl.cdiv(heads, lanes // head_width)
    sheet = block_q * block_k * (lanes // head_width)
    return Plan(
        *(batch, queries, keys, heads, width, head_width, lanes),
        tiles=max(n for n in range(1, tiles + 1) if not tiles % n and (n == 1 or n * sheet <= SHEET))
        if whole_rows
        else 1,
        block_q=block_q,
        block_k=block_k,
        whole_rows=whole_rows,
        skips=scheme.causal and extras.first is None,
    )


def packed(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, lanes]."""
    heads, width = plan.all_heads - plan.heads, plan.head_width - plan.width
    if heads or width:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, heads), (0, width)))
    return x.reshape(*x.shape[:2], -1)


def unpacked(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, lanes] -> [B, T, H, K]."""
    x = x.reshape(*x.shape[:2], plan.all_heads, plan.head_width)
    return x[:, :, : plan.heads, : plan.width]


def scalars(extras: Extras) -> jax.Array:
    """int32 [5]: the seed, and the places of the first batch row, head and query."""
    seed = jnp.zeros(2, jnp.uint32) if extras.seed is None else extras.seed
    first = jnp.zeros(3, jnp.int32) if extras.first is None else extras.first
    return jnp.concatenate([jax.lax.bitcast_convert_type(seed, jnp.int32), first])


def ids_and_sink(plan: Plan, extras: Extras) -> tuple[jax.Array | None, ...]:
    """int32 [B, 1, T] and [B, 1, S], float32 [heads], or None of each."""
    ids = (None if x is None else x[:, None] for x in (extras.query_ids, extras.key_ids))
    sink = extras.sink
    return (
        *ids,
        None if sink is None else jnp.pad(sink, (0, plan.all_heads - plan.heads)),
    )


Index = Callable[..., Any]  # of the two last grid axes and the scalars


@dataclasses.dataclass(frozen=True)
class Specs:
    """Blocks of arrays in a grid (batch, heads, one, other); `query` and `key` tell which."""

    plan: Plan
    query: Index
    key: Index

    def _spec(self, shape: tuple[int, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, index)

    def queries(self) -> pl.BlockSpec:
        """Of q and what has its shape."""
        shape = (1, self.plan.block_q, self.plan.tiles * self.plan.lanes)
        return self._spec(shape, lambda b, h, i, j, ref: (b, self.query(i, j, ref), h))

    def keys(self, key: Index | None = None) -> pl.BlockSpec:
        """Of k and v and what has their shape."""
        key = key or self.key
        shape = (1, self.plan.block_k, self.plan.tiles * self.plan.lanes)
        return self._spec(shape, lambda b, h, i, j, ref: (b, key(i, j, ref), h))

    def rows(self) -> pl.BlockSpec:
        """Of numbers of rows of scores, [B, heads, 1, T]."""
        shape = (1, self.plan.step_heads, 1, self.plan.block_q)
        return self._spec(shape, lambda b, h, i, j, ref: (b, h, 0, self.query(i, j, ref)))

    def ids_and_sink(self, extras: Extras) -> tuple[pl.BlockSpec | None, ...]:
        """Of what `ids_and_sink` returns."""
        ids: tuple[pl.BlockSpec | None, ...] = (None, None)
        if extras.query_ids is not None:
            ids = (
                self._spec(
                    (1, 1, self.plan.block_q),
                    lambda b, h, i, j, ref: (b, 0, self.query(i, j, ref)),
                ),
                self._spec(
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (4 - carries) + ("arbitrary",) * carries
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * plan.head_width * products * entries),
            transcendentals=entries,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=_INTERPRET.get(),
        name=name,
    )(*operands)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _even(size: int, most: int) -> int:
    """The size of equal blocks, a multiple of `LANES`."""
    return _up(pl.cdiv(size, pl.cdiv(size, most)), LANES)
