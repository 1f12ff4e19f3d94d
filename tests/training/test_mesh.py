"""Any mesh trains as one device, and what its programs send."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from quantizable_flax import default_config
from quantizable_flax.errors import UserError
from quantizable_flax.models.build import build_model
from quantizable_flax.nn.partition import AXES, constrain, on_mesh
from quantizable_flax.runtime.mesh import check_batch, check_sizes, make_mesh
from tests.tiny import tiny_config
from tests.training.hosts import with_devices
from tests.training.mesh_case import CHUNK, MESHES, VOCAB

ROOT = Path(__file__).parents[2]


def on_eight_devices(*arguments: str) -> dict:
    """Runs mesh_case in a process with eight virtual devices and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.mesh_case", *arguments],
        cwd=ROOT,
        env=with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("bert", marks=pytest.mark.slow),
        "opt",  # on every mesh
        pytest.param("vit", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_trains_as_one_device(tmp_path, family):
    curves = on_eight_devices("curves", str(tmp_path), family)
    assert curves["one"][-1] < curves["one"][0]
    assert curves.keys() >= {"one", "mixed"}
    for name in curves:
        # Sums over devices are taken in another order, nothing else may differ.
        np.testing.assert_allclose(curves[name], curves["one"], rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled step of a family on a mesh."""
    folder = str(tmp_path_factory.mktemp("program"))
    return functools.cache(lambda *which: on_eight_devices("program", folder, *which))


def sizes(shape: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", shape.split("[")[-1])]


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_logits_exist_by_chunk_and_part_of_the_vocabulary(program, family):
    compiled = program(family, "tensor")  # 4 sequences of 16 tokens on each device
    logits = [sizes(s) for s in compiled["shapes"] if sizes(s)[-1:] == [VOCAB // 4]]
    assert [4 * CHUNK, VOCAB // 4] in logits
    assert max(np.prod(shape) for shape in logits) == 4 * CHUNK * VOCAB // 4
    whole = [s for s in compiled["shapes"] if VOCAB in sizes(s)]
    assert whole == []  # neither logits nor the table, which lies in parts too


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_the_vocabulary_parallel_loss_gathers_no_logits(program, family):
    for kind, result in program(family, "tensor")["collectives"]:
        parts = [sizes(shape) for shape in re.findall(r"\w+\[[\d,]*\]", result)]
        if kind != "all-reduce":
            assert all(VOCAB // 4 not in shape for shape in parts), (kind, result)
        # Gradients of the table and of its bias are summed over the data axis.
        assert all(len(shape) <= 2 for shape in parts if VOCAB // 4 in shape), (kind, result)


def test_tensor_parallel_layers_sum_twice_each_way(program):
    compiled = program("opt", "tensor")
    rows, width = compiled["rows"] // MESHES["tensor"]["data"], compiled["width"]
    sums = [
        result.count(f"f32[{rows},{width}]")
        for kind, result in compiled["collectives"]
        if kind == "all-reduce"
    ]
    # Each layer: attention output and FFN forward; FFN, query, key and value backward.
    assert sum(sums) == compiled["layers"] * (2 + 4)


@pytest.mark.parametrize(("mesh", "own"), [("fsdp", 2), ("mixed", 8)])
def test_each_device_draws_for_its_own_examples(tmp_path, mesh, own):
    found = on_eight_devices("masks", str(tmp_path), mesh)
    assert found["drawn"] == [f"{own}x4x8x32"]
    assert found["collectives"] == []
    assert found["examples"] == 16
    assert found["mean"] == pytest.approx(2 * 0.75, rel=0.01)


def one_device_mesh(**sizes):
    config = default_config()
    config.mesh.update(sizes)
    return make_mesh(config.mesh, jax.devices()[:1])


def test_mesh_and_batch_errors_name_the_numbers():
    mesh = one_device_mesh()
    with pytest.raises(UserError, match=r"multiple of .* = 1 \* 3, found 8"):
        check_batch(8, 3, mesh)
    with pytest.raises(UserError, match=r"must use all 1 devices, found data=-1, fsdp=2"):
        one_device_mesh(fsdp=2)
    with pytest.raises(UserError, match="one of them may be -1"):
        one_device_mesh(fsdp=-1)


@pytest.mark.parametrize(
    ("family", "axis", "size", "message"),
    [
        ("bert", "tensor", 4, r"mesh\.tensor=4 does not divide the 2 heads"),
        ("bert", "tensor", 2, r"model\.vocab_size=161: raise it to 162"),
        ("opt", "sequence", 3, r"mesh\.sequence=3 does not divide sequences of 16 tokens"),
        ("vit", "sequence", 2, r"mesh\.sequence=2 does not divide sequences of 5 tokens"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(tmp_path, family, axis, size, message):
    changes = {"model__vocab_size": 161} if family == "bert" else {}
    config = tiny_config(tmp_path, family, **changes)
    mesh = jax.sharding.AbstractMesh(tuple(size if a == axis else 1 for a in AXES), AXES)
    with pytest.raises(UserError, match=message):
        check_sizes(config, build_model(config), mesh)


def test_nothing_is_laid_out_without_a_mesh():
    x = np.ones((4, 3))
    assert constrain(x, "batch", None) is x
    with on_mesh(one_device_mesh()):
        assert constrain(x, "batch", None) is x
