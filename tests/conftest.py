"""Settings of every test: strict shapes and types, repeatable properties, compilation shared."""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

# One cache for this process and the command lines that it starts: most tests compile the same
# few programs. It must be in the environment before jax is imported. Workers of pytest-xdist find
# there the one of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="quantizable_flax_tests")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["XDG_CACHE_HOME"] = _cache.name
    # The cache of datasets lies there as well, unless HF_HOME says otherwise.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("HF_HOME", None)
    # What is broadcast or promoted is meant to be; the command lines that tests start see it too.
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    # Made into machine code by the quickest way: a test takes longer to compile than to run, and
    # without LLVM's passes and the emitters of MLIR that takes half the time. Sums are taken in
    # another order and fewer operations are fused: see tests/compiled.py for what depends on that.
    # `XLA_FLAGS=... make test` wins, and `make soak`, what is measured, the demo and README's
    # commands do without. Runs that tests train are split over two devices.
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_force_host_platform_device_count=2",
        "--xla_cpu_parallel_codegen_split_count=1",  # the other core has a test of its own
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no such flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")

# Traced programs stay in JAX's caches: to look through millions of objects for garbage again and
# again would take a good part of the time.
gc.set_threshold(100_000, 50, 1000)


STATM = Path("/proc/self/statm")
MEMORY = 4e9  # bytes of a process between two files of tests, by much more than one file needs


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Forgets traced programs when they have become many."""
    yield
    pages = int(STATM.read_text().split()[1]) if STATM.exists() else 0  # of Linux alone
    if pages * os.sysconf("SC_PAGE_SIZE") > MEMORY:
        jax.clear_caches()
        gc.collect()
