"""Bounded minimization of a function of one number, inside jit (R. P. Brent, 1973, chapter 5).

Why it is not SciPy's: docs/quantization.md, "The search for ranges".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

GOLDEN = 0.3819660112501051  # (3 - sqrt(5)) / 2
TOLERANCE = 1e-5 / 3.0  # in the unit of the number, as scipy's `minimize_scalar(bounded)`
MAX_STEPS = 500


class Point(NamedTuple):
    """A number and the value of the function there."""

    x: jax.Array
    value: jax.Array


class _Search(NamedTuple):
    low: jax.Array
    high: jax.Array
    best: Point
    second: Point
    third: Point
    step: jax.Array  # the last one
    before: jax.Array  # the last but one: a parabola may step half as far
    steps: jax.Array


def bounded_minimum(
    function: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array
) -> Point:
    """Returns a local minimum of the function in (low, high), float32.

    Golden sections, and parabolas through the three best points where they converge faster: one
    evaluation a step, some 10 to 30 in all. Where the function has many minima, which of them is
    found depends on rounding.
    """
    x = low + GOLDEN * (high - low)
    start, zero = Point(x, function(x)), jnp.zeros_like(x)
    search = _Search(low, high, start, start, start, zero, zero, jnp.int32(1))

    def advance(search: _Search) -> _Search:
        x, step, before = _next(search)
        return _insert(search, Point(x, function(x)), step, before)

    return jax.lax.while_loop(_unfinished, advance, search).best


def _tolerance(search: _Search) -> jax.Array:
    # Below a few units in the last place of float32 no step would move the number.
    return jnp.maximum(TOLERANCE, 2.0 * jnp.finfo(jnp.float32).eps * jnp.abs(search.best.x))


def _unfinished(search: _Search) -> jax.Array:
    distance = jnp.abs(search.best.x - 0.5 * (search.low + search.high))
    left = distance > 2.0 * _tolerance(search) - 0.5 * (search.high - search.low)
    return left & (search.steps < MAX_STEPS)


def _next(search: _Search) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next place to look at, the step to it and the step that counts as the one before."""
    low, high, best, tolerance = search.low, search.high, search.best, _tolerance(search)
    middle = 0.5 * (low + high)
    r = (best.x - search.second.x) * (best.value - search.third.value)
    q = (best.x - search.third.x) * (best.value - search.second.value)
    p = (best.x - search.third.x) * q - (best.x - search.second.x) * r
    q = 2.0 * (q - r)
    p, q = jnp.where(q > 0.0, -p, p), jnp.abs(q)
    parabola = (
        (jnp.abs(search.before) > tolerance)
        & (jnp.abs(p) < jnp.abs(0.5 * q * search.before))
        & (p > q * (low - best.x))
        & (p < q * (high - best.x))
    )
    step = p / jnp.where(parabola, q, 1.0)
    x = best.x + step
    at_the_edge = (x - low < 2.0 * tolerance) | (high - x < 2.0 * tolerance)
    step = jnp.where(at_the_edge, jnp.where(middle >= best.x, tolerance, -tolerance), step)
    rest = jnp.where(best.x >= middle, low - best.x, high - best.x)
    step = jnp.where(parabola, step, GOLDEN * rest)
    before = jnp.where(parabola, search.step, rest)
    length = jnp.maximum(jnp.abs(step), tolerance)
    x = best.x + jnp.where(step >= 0.0, length, -length)
    return x, step, before


def _insert(search: _Search, new: Point, step: jax.Array, before: jax.Array) -> _Search:
    """Narrows the interval by a new point and keeps the three best."""
    low, high, best, second, third, *_ = search
    better, right = new.value <= best.value, new.x >= best.x
    low = jnp.where(better & right, best.x, jnp.where(~better & ~right, new.x, low))
    high = jnp.where(better & ~right, best.x, jnp.where(~better & right, new.x, high))
    is_second = (new.value <= second.value) | (second.x == best.x)
    is_third = (new.value <= third.value) | (third.x == best.x) | (third.x == second.x)
    return _Search(
        low,
        high,
        _select(better, new, best),
        _select(better, best, _select(is_second, new, second)),
        _select(better | is_second, second, _select(is_third, new, third)),
        step,
        before,
        search.steps + 1,
    )


def _select(condition: jax.Array, one: Point, other: Point) -> Point:
    return Point(*(jnp.where(condition, a, b) for a, b in zip(one, other, strict=True)))
