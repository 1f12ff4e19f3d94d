"""Quantized tensors and their products: our own interface, behind which AQT or qwix works."""

import dataclasses
import functools
import string
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from quantizable_flax.quantization.grid import Grid, centred, rounded
from quantizable_flax.quantization.hadamard import rotate_back
from quantizable_flax.quantization.libraries import AQT, affine_codes, library_named

Move = Callable[[jax.Array], jax.Array]


@struct.dataclass
class Quantized:
    """A tensor on a grid: `scale * (codes - zero_point)`.

    Attributes:
      codes: float32 holding integers (the simulation), or int8.
      scale: float32, a scalar or broadcastable to codes, in the tensor's unit per step.
      zero_point: int32, the shape of scale; None where it is 0.
      sums: of a weight, int32 sum of its codes over the axis that products contract, or None.
      dtype: of the values.
      wide: whether there are more codes than bfloat16 tells apart, so that it must not hold them.
      rotated: the axis, counted from the last, whose channels are rotated by hadamard.py; the
        values are those before that. None for none.
      library: which does the arithmetic, see libraries.py.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    sums: jax.Array | None = None
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)
    wide: bool = struct.field(pytree_node=False, default=False)
    rotated: int | None = struct.field(pytree_node=False, default=None)
    library: str = struct.field(pytree_node=False, default=AQT)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def is_int8(self) -> bool:
        """Whether the codes are integers that the hardware multiplies."""
        return self.codes.dtype == jnp.int8

    def centred(self) -> jax.Array:
        """`codes - zero_point` in float32: integers, exactly."""
        return centred(self.codes, self.zero_point)

    def values(self) -> jax.Array:
        """The numbers that the codes stand for."""
        found = library_named(self.library).dequantize(self.codes, self.zero_point, self.scale)
        found = rounded(found)
        if self.rotated is not None:
            found = rotate_back(found, self.rotated)
        return found.astype(self.dtype)

    def with_codes(self, codes: jax.Array) -> "Quantized":
        """Other codes on the same grid, which must have no axes of its own."""
        return dataclasses.replace(self, codes=codes, sums=None)

    def moved(self, move: Move, move_grid: Move | None = None) -> "Quantized":
        """Moves the codes by one function, and a grid that has axes by another or the same."""
        grid = move_grid or move
        scale, zero = (
            a if a is None or not jnp.ndim(a) else grid(a) for a in (self.scale, self.zero_point)
        )
        return dataclasses.replace(
            self, codes=move(self.codes), scale=cast(jax.Array, scale), zero_point=zero, sums=None
        )

    def __getitem__(self, index: Any) -> "Quantized":
        """Picks from the leading axes."""
        return self.moved(lambda a: a[index])


Tensor = jax.Array | Quantized


def beside(v: jax.Array, x: Tensor) -> jax.Array:
    """v with leading axes of 1 up to the rank of x: what is broadcast is meant to be."""
    return jax.lax.expand_dims(v, range(x.ndim - v.ndim))


def values(x: Tensor) -> jax.Array:
    """Returns the numbers of a tensor x, be it an array or codes on a grid, as a `Site` gives."""
    return x.values() if isinstance(x, Quantized) else x


def split_last(x: Tensor, parts: int) -> Tensor:
    """[..., D] -> [..., parts, D / parts]; what is rotated over all parts is on no grid then."""

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:-1], parts, a.shape[-1] // parts)

    if isinstance(x, Quantized) and x.rotated is not None:
        return split(x.values())
    # A grid with axes has length 1 in the last one, and gets another such axis.
    return x.moved(split, lambda a: a[..., None]) if isinstance(x, Quantized) else split(x)


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D]."""

    def rows(a: jax.Array) -> jax.Array:
        return a.reshape(-1, a.shape[-1])

    return x.moved(rows) if isinstance(x, Quantized) else rows(x)


@functools.partial(jax.jit, static_argnames=("wide", "library"), inline=True)
def quantize(x: jax.Array, grid: Grid, *, wide: bool = True, library: str = AQT) -> Quantized:
    """Rounds x to the grid, with straight-through gradients; the codes are centred floats.

    `wide` is False for a grid of at most 8 bits, see `Quantized`.
    """
    codes = affine_codes(x.astype(jnp.float32) / grid.scale, grid, library)
    centre = codes - grid.zero_point
    return Quantized(centre, grid.scale, dtype=x.dtype, wide=wide, library=library)


def quantize_int8(x: jax.Array, grid: Grid, *, library: str = AQT) -> Quantized:
    """Rounds x to a grid of at most 8 bits; an unsigned one is shifted by half its width.

    The shift keeps codes in int8: products of unsigned by signed bytes are slow on CPUs.
    """
    grid = _signed(grid)
    codes = affine_codes(x.astype(jnp.float32) / grid.scale, grid, library).astype(jnp.int8)
    zero_point = grid.zero_point.astype(jnp.int32)
    return Quantized(codes, grid.scale, zero_point, dtype=x.dtype, library=library)


def _signed(grid: Grid) -> Grid:
    """The same grid with codes from -(width + 1) / 2."""
    if isinstance(grid.lower, float):
        shift: Any = grid.lower + (grid.upper - grid.lower + 1.0) / 2
    else:
        shift = jnp.where(grid.lower < 0, 0.0, (grid.upper + 1.0) / 2)
    return Grid(grid.scale, *(bound - shift for bound in grid[1:]))


def apart(x: jax.Array) -> jax.Array:
    """Returns x; XLA:CPU does not fuse what computes it with what reads it.

    It would fuse a softmax or a mean with the rounding around it, and expand each scalar of a grid
    to a full tensor for that: three times as long as one after the other. The operation itself
    rounds float32 to float32, which no backend spends time on.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def fake_quantize(x: jax.Array, grid: Grid, *, library: str = AQT) -> jax.Array:
    """Rounds x to the grid and back, in x's shape and dtype, with straight-through gradients."""
    return quantize(x, grid, library=library).values()


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST for a product of float32 operands, the backend's default for narrower ones.

    By default TPUs round the operands of a float32 product to bfloat16, and GPUs to TF32.
    """
    exact = max(x.dtype.itemsize for x in operands) >= 4
    return jax.lax.Precision.HIGHEST if exact else None


def product(
    equation: str, x: Tensor, y: Tensor, dtype: Any = None, precision: Any = None
) -> jax.Array:
    """The einsum of two tensors, of integers wherever both operands are int8 codes.

    `sum s_x (q_x - z_x) s_y (q_y - z_y)` is computed as `s_x s_y` times a sum of integers. In the
    simulation that sum is taken in float32, which holds it exactly up to 2^24; so simulated and
    int8 products agree to the last bit, and no later rounding falls to the other side.

    Floats that are float32, codes of more than 8 bits among them, are multiplied as such on every
    backend, see `precision_of`.

    Args:
      equation: two operands with explicit letters, `...` for any leading axes, and `->`.
      x: the left operand; its scale must not vary along contracted axes, and what is rotated must
        be so in both along such an axis, else values are used.
      y: the right operand, the same.
      dtype: compute dtype of floats, by default as the operands are.
      precision: of products of floats, as `jnp.einsum` takes it.

    Returns:
      float32 if an operand is quantized or `dtype` is None, else `dtype`.
    """
    equation = _spelled_out(equation, x.ndim, y.ndim)
    left, right, out = equation.replace("->", ",").split(",")
    if _rotated(x, left) != _rotated(y, right):
        x, y = values(x), values(y)
    if not (isinstance(x, Quantized) or isinstance(y, Quantized)):
        x, y = (a if dtype is None else a.astype(dtype) for a in (x, y))
        return _einsum(equation, x, y, dtype or jnp.float32, precision)
    if not (_factors(x, left, out) and _factors(y, right, out)):
        return _einsum(equation, values(x), values(y))
    if isinstance(x, Quantized) and isinstance(y, Quantized) and x.is_int8 and y.is_int8:
        total = _integer_product(equation, x, y).astype(jnp.float32)
    else:
        total = _einsum(equation, *(_factor(a, dtype) for a in (x, y)))
    scale = _scale(x, left, out) * _scale(y, right, out)
    return rounded(total * scale)


def _rotated(x: Tensor, letters: str) -> str | None:
    """The letter of the axis that is rotated."""
    known = isinstance(x, Quantized) and x.rotated is not None
    return letters[x.rotated] if known else None  # type: ignore[union-attr, index]


def _einsum(
    equation: str, x: jax.Array, y: jax.Array, dtype: Any = jnp.float32, precision: Any = None
) -> jax.Array:
    precision = precision_of(x, y) if precision is None else precision
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=dtype)


def _factor(x: Tensor, dtype: Any) -> jax.Array:
    """What a product multiplies in floating point: centred codes, or values; of dtype if it may."""
    wide = isinstance(x, Quantized) and x.wide
    factor = x.centred() if isinstance(x, Quantized) else x
    return factor if dtype is None or wide else factor.astype(dtype)


def _integer_product(equation: str, x: Quantized, y: Quantized) -> jax.Array:
    """`sum (q_x - z_x)(q_y - z_y)` in int32: the zero points leave the sum as corrections."""
    left, right, out = equation.replace("->", ",").split(",")
    total = library_named(x.library).integer_einsum(equation, x.codes, y.codes)
    contracted = [letter for letter in left if letter not in out]
    length = 1
    for letter in contracted:
        length *= x.shape[left.index(letter)]
    if x.zero_point is not None:
        total = total - _to_output(x.zero_point, left, out) * _code_sums(y, right, out)
    if y.zero_point is not None:
        sums_x = _code_sums(x, left, out)
        if x.zero_point is not None:
            sums_x = sums_x - length * _to_output(x.zero_point, left, out)
        total = total - _to_output(y.zero_point, right, out) * sums_x
    return total


def _code_sums(x: Quantized, letters: str, out: str) -> jax.Array:
    """Sums of the codes over the contracted axes, aligned with the axes of the result."""
    contracted = tuple(i for i, letter in enumerate(letters) if letter not in out)
    if x.sums is not None:
        sums = jnp.expand_dims(x.sums, contracted)
    else:
        sums = jnp.sum(x.codes, contracted, keepdims=True, dtype=jnp.int32)
    return _to_output(sums, letters, out)


def _to_output(a: jax.Array, letters: str, out: str) -> jax.Array:
    """Aligns a scalar, or an array with length 1 on contracted axes, with the result's axes."""
    if not jnp.ndim(a):
        return a
    kept = [letter for letter in letters if letter in out]
    a = a.reshape([a.shape[letters.index(letter)] for letter in kept])
    a = a.transpose([kept.index(letter) for letter in out if letter in kept])
    return jnp.expand_dims(a, tuple(i for i, letter in enumerate(out) if letter not in kept))


def _scale(x: Tensor, letters: str, out: str) -> jax.Array | float:
    return _to_output(x.scale, letters, out) if isinstance(x, Quantized) else 1.0


def _factors(x: Tensor, letters: str, out: str) -> bool:
    """Whether the scale leaves the sum: it does not vary along a contracted axis."""
    if not isinstance(x, Quantized) or not jnp.ndim(x.scale):
        return True
    return all(x.scale.shape[i] == 1 for i, letter in enumerate(letters) if letter not in out)


def _spelled_out(equation: str, *ndims: int) -> str:
    """Replaces `...` by letters, the same leading axes in both operands."""
    first = equation.split(",")[0]
    free = "".join(letter for letter in string.ascii_lowercase if letter not in equation)
    return equation.replace("...", free[: ndims[0] - len(first.replace("...", ""))])
