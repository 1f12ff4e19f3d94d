"""How an attention is laid onto a TPU: layout of its arrays and sizes of blocks.

Arrays stay as they come, [B, T, H, K] seen as [B, T, H K], for TPUs fill the last axis up to 128
lanes: as [B, H, T, 64] they would take twice the memory and need a transposition. So a block of
128 lanes is a tile of several narrow heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from quantizable_flax.kernels.scheme import Extras, Scheme

LANES = 128
SHEET = 2**17  # scores of a head in a grid step with whole rows
STEP = 2**18  # scores of all its heads, where it takes several tiles
BLOCK = 512  # queries and keys of a block where rows are not whole
CAUSAL_BLOCK = 256  # of queries: smaller ones look at fewer hidden keys
STEP_BYTES = 2**23  # of its blocks, of two steps at a time, in the backward pass
PREFIXES = 4  # different numbers of keys that causal blocks of queries look at; each is a program
WHOLE_ROWS = 2**19  # bytes of keys of a tile up to which rows of scores are whole
CAUSAL_WHOLE_ROWS = 1024  # keys; beyond, blocks that nobody sees are worth being left out


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
      causal: whether a query sees the keys up to it alone.
      skips: whether that is known when the kernel is made, no place of a first query being given.
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
    causal: bool
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

    def rows(self) -> jax.ShapeDtypeStruct:
        """Of numbers of rows of scores."""
        return jax.ShapeDtypeStruct((self.batch, self.all_heads, 1, self.queries), jnp.float32)

    def prefixes(self) -> list[int]:
        """Keys that a block of queries looks at where rows are whole, by block or one for all."""
        if not self.skips:
            return [self.block_k]
        step = max(self.block_q, _up(pl.cdiv(self.block_k, PREFIXES), LANES))
        ends = (_up((i + 1) * self.block_q, step) for i in range(self.grid[2]))
        return [min(self.block_k, end) for end in ends]

    def entries(self) -> int:
        """Scores of one head and batch row that are computed."""
        if not self.skips:
            return self.queries * self.keys
        if self.whole_rows:
            return self.block_q * sum(self.prefixes())
        ends = (_up((i + 1) * self.block_q, self.block_k) for i in range(self.grid[2]))
        return self.block_q * sum(min(self.grid[3] * self.block_k, end) for end in ends)

    def step_bytes(self, itemsize: int) -> int:
        """Of the blocks of a grid step of the backward pass, those of the next one included."""
        rows = 3 * self.block_q + 4 * self.block_k
        return 2 * rows * self.tiles * self.lanes * itemsize


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
    plan = Plan(
        *(batch, queries, keys, heads, width, head_width, lanes),
        tiles=1,
        block_q=block_q,
        block_k=block_k,
        whole_rows=whole_rows,
        causal=scheme.causal,
        skips=scheme.causal and extras.first is None,
    )
    if not whole_rows:
        return plan
    tiles = plan.grid[1]
    most = min(
        STEP // (block_q * block_k * plan.tile_heads),
        STEP_BYTES // plan.step_bytes(k.dtype.itemsize),
    )
    fits = (n for n in range(1, tiles + 1) if tiles % n == 0 and n <= max(1, most))
    return dataclasses.replace(plan, tiles=max(fits))


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


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _even(size: int, most: int) -> int:
    """The size of equal blocks, a multiple of `LANES`."""
    return _up(pl.cdiv(size, pl.cdiv(size, most)), LANES)
