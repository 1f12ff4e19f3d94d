"""The compiled int8 model: which products are integers, and what it is given."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import traverse_util

from tests.ptq.int8_programs import LAYERS, PRODUCTS, of_hlo, of_stablehlo, small_int8

ROOT = pathlib.Path(__file__).parents[2]


def expected(name: str, gate: str, setup: str, types: dict[str, str]) -> dict[str, int]:
    """Integer products of the layers and around them; floating point ones of gate and head."""
    by_layer, around = PRODUCTS[name]
    in_float = LAYERS * {"none": 0, "linear": 1, "mlp": 2}[gate]
    if setup == "fp32_head":
        head = 2 if name == "bert" else 1
        around, in_float = around - head, in_float + head
    integer, floating = types["integer"], types["float"]
    counts = {integer: LAYERS * by_layer + around, floating: in_float}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    ("name", "gate", "setup"),
    [
        ("bert", "none", "all"),
        ("bert", "linear", "fp32_head"),
        ("opt", "linear", "all"),
        pytest.param("opt", "none", "fp32_head", marks=pytest.mark.slow),
        ("opt projected", "none", "all"),
        ("vit", "all_heads_linear", "all"),
        pytest.param("vit", "none", "fp32_head", marks=pytest.mark.slow),
    ],
)
def test_products_are_of_integers(name, gate, setup):
    forward, arguments, case = small_int8(name, gate, setup)
    lowered = jax.jit(forward).lower(*arguments)
    kind = "linear" if gate != "none" else gate
    stable = {"integer": "i8 x i8 -> i32", "float": "f32 x f32 -> f32"}
    assert of_stablehlo(lowered.as_text()) == expected(name, kind, setup, stable)
    compiled = {"integer": "s8 x s8 -> s32", "float": "f32 x f32 -> f32"}
    if jax.default_backend() == "cpu":
        found = of_hlo(lowered.compile().as_text())
        assert found == expected(name, kind, setup, compiled)
    check_arguments(lowered, case, float_table=setup == "fp32_head" and name in ("bert", "opt"))


def check_arguments(lowered, case, *, float_table: bool) -> None:
    """No float array of the shape of a quantized weight, but the table of a float head."""
    codes = traverse_util.flatten_dict(case.codes, sep="/")
    quantized = {x.shape for path, x in codes.items() if path.endswith("/codes") and x.ndim == 2}
    assert quantized
    given = jax.tree.leaves(lowered.in_avals)
    floats = {x.shape for x in given if x.dtype.kind == "f" and len(x.shape) == 2}
    # BERT's float head has a layer of the shape of others.
    dense = codes.get("mlm_head/dense/kernel")
    head = {(96, 32)} if float_table else set()
    head |= set() if dense is None else {dense.shape}
    assert floats & (quantized | {(96, 32)}) == head
    layers = [path for path in codes if path.startswith("layer_") and codes[path].ndim == 2]
    assert all(path.endswith("/codes") for path in layers if "/gate/" not in path)
    assert {x.shape for x in given if x.dtype == "int8"} >= quantized


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_products_of_a_tpu_program_are_of_integers():
    """Compiled ahead of time for a v5e; in a process of its own, for its environment."""
    environment = {
        **os.environ,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    command = [sys.executable, "-m", "tests.ptq.int8_programs"]
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 2 * len(PRODUCTS)
    for case, counts in found.items():
        name, _ = case.split(", ")
        integers = LAYERS * PRODUCTS[name][0] + PRODUCTS[name][1]
        # A gate's sums are no convolutions there.
        assert counts == {"s8 x s8 -> s32": integers}, case
