"""Lines of compiled TPU programs, shortened; and programs of 8 devices whose bytes are known."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

# A loop of 8 passes that only its condition tells, an asynchronous gather in it, VMEM as S(1).
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%slice_one (param_0: bf16[8,1024,256], param_1: s32[]) -> bf16[1,1024,256] {
  %param_0 = bf16[8,1024,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.3 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0, \
%param_1, %zero, %zero), dynamic_slice_sizes={1,1024,256}
}

%body (state: (s32[], bf16[512,1024], bf16[8,1024,256])) -> (s32[], bf16[512,1024], \
bf16[8,1024,256]) {
  %state = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[8,1024,256]{2,1,0}) \
parameter(0)
  %i = s32[]{:T(128)S(1)} get-tuple-element(%state), index=0
  %x = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[8,1024,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %fusion.1 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, \
calls=%slice_one
  %all-gather-start.1 = (bf16[1,1024,256]{2,1,0:S(1)}, bf16[1,1024,1024]{2,1,0:S(1)}) \
all-gather-start(%fusion.1), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=4] \
{'axis_1'}, dimensions={2}, use_global_device_ids=true, metadata={op_name="jit(f)/gather"}
  %all-gather-done.1 = bf16[1,1024,1024]{2,1,0:S(1)} all-gather-done(%all-gather-start.1)
  %bitcast.1 = bf16[1024,1024]{1,0:S(1)} bitcast(%all-gather-done.1)
  %convolution.5 = bf16[512,1024]{1,0:S(1)} convolution(%x, %bitcast.1), dim_labels=bf_io->bf
  %step = s32[]{:T(128)S(1)} constant(1)
  %next = s32[]{:T(128)S(1)} add(%i, %step)
  %copy.8 = s32[]{:T(128)S(1)} copy(%next)
  ROOT %tuple.14 = (s32[]{:T(128)}, bf16[512,1024]{1,0:S(1)}, bf16[8,1024,256]{2,1,0}) \
tuple(%copy.8, %convolution.5, %w)
}

%condition (state.1: (s32[], bf16[512,1024], bf16[8,1024,256])) -> pred[] {
  %limit = s32[]{:T(128)S(1)} constant(8)
  %state.1 = (s32[]{:T(128)}, bf16[512,1024]{1,0}, bf16[8,1024,256]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)S(1)} get-tuple-element(%state.1), index=0
  ROOT %lt.3 = pred[]{:T(512)S(1)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.0: bf16[512,1024], w.0: bf16[8,1024,256]) -> bf16[512,1024] {
  %x.0 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.0 = bf16[8,1024,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %first = s32[]{:T(128)S(1)} constant(0)
  %copy.9 = s32[]{:T(128)S(1)} copy(%first)
  %tuple.15 = (s32[]{:T(128)}, bf16[512,1024]{1,0:S(1)}, bf16[8,1024,256]{2,1,0}) \
tuple(%copy.9, %x.0, %w.0)
  %while.9 = (s32[]{:T(128)}, bf16[512,1024]{1,0:S(1)}, bf16[8,1024,256]{2,1,0}) \
while(%tuple.15), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %done = bf16[512,1024]{1,0:S(1)} get-tuple-element(%while.9), index=1
}
"""

# A reduce-scatter as a TPU has it, one gather that two fusions span, and 12 small products.
FUSED = """HloModule jit_g, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0} parameter(0)
  %all-reduce.2 = f32[64,128]{1,0} all-reduce(%input), channel_id=32, \
replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}, to_apply=%add
  %offset = s32[] constant(0)
  ROOT %part = f32[16,128]{1,0} dynamic-slice(%all-reduce.2, %offset, %offset), \
dynamic_slice_sizes={16,128}
}

%async_collective_fusion.1 (p: s32[32,40]) -> s32[64,40] {
  %p = s32[32,40]{1,0} parameter(0)
  ROOT %all-gather.7 = s32[64,40]{1,0} all-gather(%p), channel_id=75, \
replica_groups=[8,2]<=[2,2,2,2]T(0,3,2,1), dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%async_collective_fusion.2 (p.1: s32[32,40]) -> s32[64,40] {
  %p.1 = s32[32,40]{1,0} parameter(0)
  ROOT %all-gather.8 = s32[64,40]{1,0} all-gather(%p.1), channel_id=75, \
replica_groups=[8,2]<=[2,2,2,2]T(0,3,2,1), dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%heads (q: bf16[12,128,64], k: bf16[12,128,64]) -> bf16[12,128,128] {
  %q = bf16[12,128,64]{2,1,0} parameter(0)
  %k = bf16[12,128,64]{2,1,0} parameter(1)
  ROOT %convolution.9 = bf16[12,128,128]{2,1,0} convolution(%q, %k), \
window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0oi->0bf
}

ENTRY %main (g: f32[64,128], i: s32[32,40], q.1: bf16[12,128,64]) -> bf16[12,128,128] {
  %g = f32[64,128]{1,0} parameter(0)
  %i = s32[32,40]{1,0} parameter(1)
  %q.1 = bf16[12,128,64]{2,1,0} parameter(2)
  %fusion.2 = f32[16,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.3 = s32[64,40]{1,0} fusion(%i), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.4 = s32[64,40]{1,0} fusion(%i), kind=kCustom, calls=%async_collective_fusion.2
  %permute = (f32[16,128]{1,0}, f32[16,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%fusion.2), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %all-reduce.5 = (f32[16,128]{1,0}, /*index=1*/bf16[]{:T(256)}) all-reduce(%fusion.2, %fusion.2), \
channel_id=10, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %fusion.5 = bf16[12,128,128]{2,1,0} fusion(%q.1, %q.1), kind=kOutput, calls=%heads
}
"""

ROWS, COLUMNS, DEVICES = 64, 32, 4
SIZE = ROWS * COLUMNS * 4


def on_8_devices() -> dict[str, dict]:
    """By name: what the accounting finds in programs of a 4 x 2 mesh; in a process of its own."""
    from quantizable_flax.aot import collectives, hlo, hlo_cost

    mesh = jax.make_mesh((DEVICES, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rows, whole, columns = PartitionSpec("x"), PartitionSpec(), PartitionSpec(None, "x")

    def loop(a):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c @ c.T @ c, "y"), None), a, None, length=5)

    programs = {
        "all-reduce": (lambda a: jax.lax.psum(a, "x"), whole, whole),
        "all-gather": (lambda a: jax.lax.all_gather(a, "x", tiled=True), rows, whole),
        "reduce-scatter": (lambda a: jax.lax.psum_scatter(a, "x", tiled=True), whole, rows),
        "all-to-all": (lambda a: jax.lax.all_to_all(a, "x", 1, 0, tiled=True), rows, columns),
        "collective-permute": (
            lambda a: jax.lax.ppermute(a, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]),
            rows,
            rows,
        ),
        "loop": (lambda a: loop(a)[0], whole, whole),
    }
    found = {}
    for name, (function, given, returned) in programs.items():
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=given, out_specs=returned, check_vma=False
        )
        argument = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
        program = hlo.parse(jax.jit(sharded).lower(argument).compile().as_text())
        sent = collectives.by_kind(collectives.collectives_of(program, 8))
        found[name] = {
            "sent": sent,
            "flops": hlo_cost.matrix_flops(program),
            "hbm": hlo_cost.hbm_bytes(program),
            "unknown_loops": program.unknown_loops,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(on_8_devices()))

# A Pallas kernel for BERT-base's attention, which states its cost, and a call that does not.
KERNEL = """HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[4,512,768], k: bf16[4,512,768], v: bf16[4,512,768]) -> bf16[4,512,768] {
  %q = bf16[4,512,768]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,512,768]{2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[4,512,768]{2,1,0:T(8,128)(2,1)} parameter(2)
  %custom-call = bf16[4,512,768]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%v), \
custom_call_target="ConcatBitcast", backend_config={"flag_configs":[]}
  ROOT %attention.1 = bf16[4,512,768]{2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %custom-call), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzvUgFN", \
"cost_estimate":{"flops":"3221225472","transcendentals":"12582912"}}}
}
"""
