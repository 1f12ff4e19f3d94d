"""Bytes and FLOPs of compiled programs: of known texts, and of programs whose cost is known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantizable_flax.aot import collectives, hlo, hlo_cost
from tests.aot.hlo_texts import DEVICES, FUSED, KERNEL, LOOP, ROWS, SIZE
from tests.training.hosts import with_devices

ROOT = Path(__file__).parents[2]


def test_a_loop_counts_every_pass():
    program = hlo.parse(LOOP)
    assert program.times == {"slice_one": 8, "body": 8, "condition": 8, "main": 1}
    assert program.unknown_loops == 0
    (gather,) = collectives.collectives_of(program, 8)
    assert (gather.kind, gather.group, gather.times) == ("all-gather", 4, 8)
    assert gather.op_name == "jit(f)/gather"
    assert gather.in_words == (
        "12.58 MB all-gather of bf16[1,1024,1024] among 4, 8 times jit(f)/gather"
    )
    assert gather.wire_bytes == 8 * 3 / 4 * 1024 * 1024 * 2
    assert hlo_cost.matrix_flops(program) == 8 * 2 * 512 * 1024 * 1024
    # Of the weights a slice is read in every pass; all else lies in VMEM.
    assert hlo_cost.hbm_bytes(program) == 8 * 1024 * 256 * 2


def test_annotated_and_unknown_loops():
    known = LOOP.replace(
        "body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"3"}},'
    )
    assert hlo.parse(known).times["body"] == 3
    unknown = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert (unknown.times["body"], unknown.unknown_loops) == (1, 1)
    for step, passes in ((2, 4), (3, 3)):  # TPU loops that multiply and send in turns add two
        text = LOOP.replace(
            "%step = s32[]{:T(128)S(1)} constant(1)", f"%step = s32[] constant({step})"
        )
        assert hlo.parse(text).times["body"] == passes
    doubled = hlo.parse(LOOP.replace("add(%i, %step)", "multiply(%i, %step)"))
    assert (doubled.times["body"], doubled.unknown_loops) == (1, 1)
    assert (
        hlo.parse(LOOP.replace("constant(0)\n  %copy", "constant(6)\n  %copy")).times["body"] == 2
    )


def test_collectives_of_a_tpu_program():
    found = collectives.collectives_of(hlo.parse(FUSED), 16)
    assert sorted((c.kind, c.group, c.wire_bytes) for c in found) == [
        ("all-gather", 2, 1 / 2 * 64 * 40 * 4),  # once, though two fusions show it
        ("all-reduce", 8, 2 * 7 / 8 * (16 * 128 * 4 + 2)),
        ("collective-permute", 2, 16 * 128 * 4),
        ("reduce-scatter", 4, 3 / 4 * 64 * 128 * 4),
    ]
    assert collectives.by_kind(found)["reduce-scatter"] == 3 / 4 * 64 * 128 * 4


def test_products_and_traffic_of_a_tpu_program():
    program = hlo.parse(FUSED)
    # Twelve heads as a window whose other places are holes.
    assert hlo_cost.matrix_flops(program) == 2 * 12 * 128 * 128 * 64
    scattered, gathered = 16 * 128 * 4, 32 * 40 * 4 + 64 * 40 * 4
    reduced = 2 * scattered + scattered + 2
    heads = 2 * 12 * 128 * 64 * 2 + 12 * 128 * 128 * 2
    total = 64 * 128 * 4 + scattered + 2 * gathered + 2 * scattered + 8 + reduced + heads
    assert hlo_cost.hbm_bytes(program) == pytest.approx(total, abs=16)


def test_a_kernel_counts_what_it_states():
    """Scores and context of 12 heads of 64, 512 tokens, 4 sequences; operands and result in HBM."""
    program = hlo.parse(KERNEL)
    assert hlo_cost.matrix_flops(program) == 2 * 2 * 4 * 12 * 512 * 512 * 64
    # q, k and the result; the other call reads v from there, and what it hands on is in VMEM.
    assert hlo_cost.hbm_bytes(program) == (2 + 1 + 1) * 4 * 512 * 768 * 2


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 256),
        ("[2,128]<=[256]", 128),
        ("[4,4]<=[8,2]T(1,0)", 4),
        ("mesh['data'=16,'tensor'=2] {'data'}", 16),
        ("mesh['a'=4,'b'=2,'c'=2] {'a','c'}", 8),
        ("mesh['a'=8,'b'=2] {'a':(2)4}", 4),
    ],
)
def test_groups_in_every_notation(written, size):
    attributes = f", channel_id=1, replica_groups={written}, use_global_device_ids=true"
    assert collectives.group_size(attributes, 256) == size


def test_sizes_of_types():
    shapes = hlo.shapes_in(
        "(f32[768]{0:T(1024)S(1)}, /*index=1*/pred[2,3], s4[3], bf16[], token[])"
    )
    assert [shape.bytes for shape in shapes] == [3072, 6, 2, 2, 0]
    assert [shape.space for shape in shapes] == [1, 0, 0, 0, 0]


def test_real_programs_send_what_the_formulas_say():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.hlo_texts"],
        cwd=ROOT,
        env=with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ring = (DEVICES - 1) / DEVICES
    assert found["all-reduce"]["sent"] == {"all-reduce": 2 * ring * SIZE}
    assert found["all-gather"]["sent"] == {"all-gather": ring * SIZE}
    assert found["reduce-scatter"]["sent"] == {"reduce-scatter": ring * SIZE}
    assert found["all-to-all"]["sent"] == {"all-to-all": ring * SIZE / DEVICES}
    assert found["collective-permute"]["sent"] == {"collective-permute": SIZE / DEVICES}
    # Five passes of an all-reduce among two devices and of two products.
    loop = found["loop"]
    assert loop["sent"] == {"all-reduce": 5 * SIZE}
    assert loop["flops"] == 5 * 2 * 2 * ROWS * ROWS * (SIZE // ROWS // 4)
    assert all(program["unknown_loops"] == 0 for program in found.values())
    # Reads its operand, writes its result.
    assert found["all-gather"]["hbm"] == SIZE / DEVICES + SIZE
