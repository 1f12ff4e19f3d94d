"""Whether fused attention on this device is the formula, by path and kind of attention.

    python -m benchmarks.attention_check [--paths=gpu,blockwise] [--seconds=120]

Prints, a line each, the largest error of the result and of the gradients as a share of the largest
entry of the exact ones, which NumPy computes in float64 from the same bfloat16 operands. Failures
are printed by their first line; whatever fails or hangs (takes longer than `--seconds`), the rest
goes on in a new process, for an error of a GPU kernel spoils the one it happens in.
"""

import argparse
import dataclasses
import os
import queue
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.kernels import gpu
from quantizable_flax.kernels.attention import fused_attention
from quantizable_flax.kernels.random_bits import kept, row_words
from quantizable_flax.kernels.scheme import Extras, Scheme, visible
from quantizable_flax.nn.mask import Mask

TOLERANCE = 0.02
SINK_TOLERANCE = 0.1  # of a sum over all queries whose terms are of either sign
FAILED = 3  # the status of a process after a failure
SCALE = 0.125
CLIPPED = Scheme(SCALE, gamma=-0.03, zeta=1.003)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and switches of an attention."""

    name: str
    queries: int
    keys: int
    scheme: Scheme = CLIPPED
    mask: str = "none"
    sink: bool = False
    first: tuple[int, int, int] | None = None
    width: int = 64
    batch: int = 2
    heads: int = 3


def changed(**changes) -> Scheme:
    """`CLIPPED` but for `changes`."""
    return dataclasses.replace(CLIPPED, **changes)


CASES = (
    Case("one tile", 128, 128),
    Case("plain softmax", 512, 512, Scheme(SCALE)),
    Case("four blocks", 512, 512),
    Case("BERT, padding, dropout", 128, 128, changed(dropout_rate=0.1), "padding"),
    Case("OPT, causal, dropout", 512, 512, changed(causal=True, dropout_rate=0.1)),
    Case("ViT", 197, 197),
    Case("plain, causal, sink", 300, 300, Scheme(SCALE, causal=True), sink=True),
    Case("segments, dropout, sink", 700, 700, changed(dropout_rate=0.3), "segments", True),
    Case("more queries than keys, placed", 300, 70, changed(causal=True), first=(3, 1, 40)),
    Case("wide heads, everything", 260, 390, changed(dropout_rate=0.1), "padding", True, width=128),
    Case("few rows", 5, 3),
    Case("long, causal", 2048, 2048, changed(causal=True, dropout_rate=0.1), "padding", batch=1),
)


def arrays_of(case: Case):
    """q, k, v, dO and extras, on the host."""
    rng = np.random.default_rng(0)
    shapes = [(case.batch, n, case.heads, case.width) for n in (case.queries, case.keys)]
    arrays = [rng.normal(size=shapes[i]).astype(jnp.bfloat16) for i in (0, 1, 1, 0)]
    ids = (None, None)
    if case.mask == "padding":  # the last row of a batch of several sees nothing
        shown = rng.random((case.batch, case.keys)) < 0.7
        shown[1:] = False
        ids = Mask(jnp.asarray(shown)).extras(case.batch, case.queries, case.keys)[:2]
    elif case.mask == "segments":
        ids = (
            jnp.asarray(np.sort(rng.integers(-1, 3, (case.batch, n)), axis=1), jnp.int32)
            for n in (case.queries, case.keys)
        )
    sink = jnp.asarray(rng.normal(size=case.heads), jnp.float32) if case.sink else None
    seed = jnp.array([3, 7], jnp.uint32) if case.scheme.dropout_rate else None
    first = None if case.first is None else jnp.array(case.first, jnp.int32)
    return *arrays, Extras(*ids, sink=sink, seed=seed, first=first)


def exact(case: Case, q, k, v, d_out, extras: Extras):
    """O, dQ, dK, dV and the sink's gradient in float64, and dO without rows that lie on a bound."""
    scheme = case.scheme
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    shape = (case.batch, case.heads, case.queries, case.keys)
    seen = visible(scheme, extras, *(jnp.arange(n, dtype=jnp.int32) for n in shape[2:]))
    seen = np.broadcast_to(True if seen is None else np.asarray(seen), shape)
    scores = np.where(seen, scheme.scale * np.einsum("BTHK,BSHK->BHTS", q, k), -np.inf)
    sink = np.full(case.heads, -np.inf) if extras.sink is None else np.asarray(extras.sink, float)
    sink = np.broadcast_to(sink[None, :, None, None], (*shape[:3], 1))
    highest = np.maximum(scores.max(-1, keepdims=True), sink)
    highest = np.where(np.isinf(highest), 0.0, highest)
    total = np.exp(scores - highest).sum(-1, keepdims=True) + np.exp(sink - highest)
    total = np.where(total == 0.0, 1.0, total)
    probs, sink_probs = np.exp(scores - highest) / total, np.exp(sink - highest) / total
    stretch = scheme.zeta - scheme.gamma
    stretched = stretch * probs + scheme.gamma
    inside = seen & (stretched >= 0) & (stretched <= 1)
    if scheme.clips:
        near = np.minimum(np.abs(stretched), np.abs(stretched - 1)) < 1e-5 * stretch * probs
        d_out = d_out * ~np.swapaxes((near & seen).any(-1), 1, 2)[..., None]
    keep = dropout_mask(scheme, extras, shape) / (1.0 - scheme.dropout_rate)
    weights = np.where(seen, np.clip(stretched, 0.0, 1.0), 0.0) * keep
    d_probs = stretch * inside * keep * np.einsum("BTHK,BSHK->BHTS", d_out, v)
    weighted = (probs * d_probs).sum(-1, keepdims=True)
    d_scores = scheme.scale * probs * (d_probs - weighted)
    results = (
        np.einsum("BHTS,BSHK->BTHK", weights, v),
        np.einsum("BHTS,BSHK->BTHK", d_scores, k),
        np.einsum("BHTS,BTHK->BSHK", d_scores, q),
        np.einsum("BHTS,BTHK->BSHK", weights, d_out),
        None if extras.sink is None else -(sink_probs * weighted).sum((0, 2, 3)),
    )
    return results, d_out


def dropout_mask(scheme: Scheme, extras: Extras, shape) -> np.ndarray:
    """Which entries are kept, of the whole [B, H, T, S]."""
    if not scheme.dropout_rate:
        return np.ones(shape)
    batch, head, query, key = (jnp.asarray(x) for x in np.indices(shape, np.int32))
    first = (0, 0, 0) if extras.first is None else extras.first
    words = row_words(extras.seed, batch + first[0], head + first[1], query + first[2])
    return np.asarray(kept(words, key, scheme.dropout_rate), np.float64)


def errors(path: str, case: Case) -> str:
    """The line of a case."""
    *inputs, d_out, extras = arrays_of(case)
    inputs = [jnp.asarray(x) for x in inputs]
    if path == "gpu" and (reason := gpu.supports(case.scheme, *inputs[:3])):
        return f"unavailable: {reason}"
    expected, d_out = exact(case, *inputs, d_out, extras)

    @jax.jit
    def run(q, k, v, sink, d_out):
        def attend(q, k, v, sink):
            return fused_attention(path, case.scheme, q, k, v, extras._replace(sink=sink))

        out, vjp = jax.vjp(attend, q, k, v, sink)
        return out, *vjp(d_out)

    start = time.perf_counter()
    found = jax.block_until_ready(run(*inputs, extras.sink, jnp.asarray(d_out, jnp.bfloat16)))
    seconds = time.perf_counter() - start
    right, parts = True, []
    for name, one, other in zip(("out", "dq", "dk", "dv", "dsink"), found, expected, strict=True):
        if other is not None:
            error = np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max()
            right &= bool(error < (SINK_TOLERANCE if name == "dsink" else TOLERANCE))
            parts.append(f"{name} {error:.4f}")
    verdict = "ok" if right else "WRONG"
    return f"{verdict}  {'  '.join(parts)}  ({seconds:.1f} s with compilation)"


def work(paths: list[str], begin: int) -> None:
    """Prints the lines of all cases from `begin` on, up to the first that fails."""
    for index, (path, case) in enumerate((p, c) for c in CASES for p in paths):
        if index < begin:
            continue
        try:
            line, status = errors(path, case), 0
        except Exception as error:  # whatever it is, it is the result
            first = (str(error).strip() or "no message").splitlines()[0]
            line, status = f"FAILED  {type(error).__name__}: {first[:300]}", FAILED
        print(f"{path:10} {case.name:32} {line}", flush=True)
        if status:
            os._exit(status)  # a GPU in error keeps a process from its usual end


def supervise(paths: list[str], seconds: float) -> None:
    """Runs `work` in processes, a new one after each failure."""
    done, total = 0, len(CASES) * len(paths)
    while done < total:
        command = [sys.executable, "-m", "benchmarks.attention_check"]
        command += [f"--paths={','.join(paths)}", f"--begin={done}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        lines: queue.Queue = queue.Queue()
        stream = process.stdout
        threading.Thread(target=lambda s=stream, q=lines: [*map(q.put, s), q.put(None)]).start()
        while done < total:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                line = f"{paths[done % len(paths)]:10} {CASES[done // len(paths)].name:32} HANGS\n"
                process.kill()
                process.wait()
            if line is None:
                if process.wait() not in (0, FAILED):
                    line = f"{CASES[done // len(paths)].name}: status {process.returncode}\n"
                else:
                    break
            done += 1
            print(line, end="", flush=True)
            if process.poll() not in (None, 0):
                break
        process.kill()


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", default="gpu,blockwise")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--begin", type=int, default=-1, help="of a process that works")
    args = parser.parse_args()
    if args.begin >= 0:
        return work(args.paths.split(","), args.begin)
    print(f"jax {jax.__version__}", flush=True)
    supervise(args.paths.split(","), args.seconds)


if __name__ == "__main__":
    main()
