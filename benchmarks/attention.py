"""Attention alone: every path that this machine has, forwards and with gradients, side by side.

    python -m benchmarks.attention [--lengths=128,512,2048 --batch_tokens=4096 --heads=4 --width=64]

Each length T has a batch of batch_tokens / T sequences. Paths are timed in turn, round after round;
printed are medians, their spread, the ratio to the unfused attention of the same run, and the
temporaries of the compiled program. "jax.nn" is `jax.nn.dot_product_attention` (cuDNN's flash
attention on a GPU), which knows the ordinary softmax alone.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantizable_flax import dot_product_attention, make_softmax
from quantizable_flax.kernels.attention import PATHS
from quantizable_flax.kernels.scheme import Scheme

GAMMAS = {"vanilla": 0.0, "clipped": -0.025}
Attend = Callable[..., jax.Array]


def ours(implementation: str, scheme: Scheme, q, k, v, key) -> jax.Array:
    """The one with whole matrices, or one of our fused programs."""
    return dot_product_attention(
        q,
        k,
        v,
        is_causal=scheme.causal,
        implementation=implementation,
        softmax=make_softmax("clipped", gamma=scheme.gamma, zeta=scheme.zeta),
        dropout_rate=scheme.dropout_rate,
        dropout_key=key,
    )


def library(implementation: str, scheme: Scheme, q, k, v, key) -> jax.Array:
    """JAX's own."""
    del key
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=scheme.causal, implementation=implementation
    )


def paths(scheme: Scheme) -> dict[str, Attend]:
    """Name -> `(q, k, v, key) -> context`, those that the platform has."""
    platform = jax.default_backend()
    names = ["unfused", *(path for path in PATHS if path in ("blockwise", platform))]
    found: dict[str, Attend] = {name: functools.partial(ours, name, scheme) for name in names}
    if not scheme.clips and not scheme.dropout_rate:
        kind = "cudnn" if platform == "gpu" else "xla"
        found[f"jax.nn ({kind})"] = functools.partial(library, kind, scheme)
    return found


def program(attend: Attend, gradients: bool, operands):
    """The compiled program, or the first line of why there is none."""

    def loss(q, k, v, key):
        return jnp.sum(attend(q, k, v, key).astype(jnp.float32))

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradients else attend
    try:
        return jax.jit(function).lower(*operands).compile()
    except Exception as error:  # a path that fails must not stop the others
        return str(error).splitlines()[0]


def timed(programs: dict, operands, rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round, all programs in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_index in range(rounds + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            once = time.perf_counter() - start
            calls = max(1, min(20, int(0.05 / once)))
            start = time.perf_counter()
            for _ in range(calls):
                result = run(*operands)
            jax.block_until_ready(result)
            if round_index:
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def compare(options: argparse.Namespace, length: int, kind: str, gradients: bool) -> None:
    """Prints a line for each path."""
    scheme = Scheme(options.width**-0.5, GAMMAS[kind], 1.0, options.causal, options.dropout)
    shape = (max(1, options.batch_tokens // length), length, options.heads, options.width)
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [jax.random.normal(key, shape, options.dtype) for key in keys[:3]] + [keys[3]]
    built = {name: program(attend, gradients, operands) for name, attend in paths(scheme).items()}
    title = f"{kind:8} T {length:5} {'gradients' if gradients else 'forward':9}"
    seconds = timed(
        {n: p for n, p in built.items() if not isinstance(p, str)}, operands, options.rounds
    )
    base = statistics.median(seconds["unfused"]) if "unfused" in seconds else float("nan")
    for name, run in built.items():
        if isinstance(run, str):
            print(f"{title} {name:16} failed: {run}")
            continue
        median, spread = statistics.median(seconds[name]), max(seconds[name]) - min(seconds[name])
        size = run.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"{title} {name:16} {median * 1e3:9.3f} ms (spread {spread * 1e3:.3f})  "
            f"{median / base:.3f} x unfused  temporaries {size:9.1f} MiB",
            flush=True,
        )


def main() -> None:
    """Prints all lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="128,512,2048")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--kinds", default="vanilla,clipped")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(options)}")
    for length in map(int, options.lengths.split(",")):
        for kind in options.kinds.split(","):
            for gradients in (False, True):
                compare(options, length, kind, gradients)


if __name__ == "__main__":
    main()
