"""Compiles attention, forwards and backwards, for a TPU that is not there; prints what came of it.

Run as `python -m tests.kernels.tpu_programs v5e:2x2`.
"""

import json
import sys

from quantizable_flax.aot.topology import devices_of, prepare

prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from quantizable_flax.kernels.attention import fused_attention  # noqa: E402
from quantizable_flax.kernels.scheme import Extras, Scheme  # noqa: E402
from tests.kernels.case import Case  # noqa: E402

CLIPPED = Scheme(0.125, gamma=-0.03, zeta=1.03)
DROPS = Scheme(0.125, gamma=-0.03, zeta=1.03, dropout_rate=0.1)
CAUSAL = Scheme(0.125, gamma=-0.03, zeta=1.03, causal=True, dropout_rate=0.1)
BF16 = {"dtype": "bfloat16", "width": 64}

PROGRAMS = {
    "bert": Case(128, 128, DROPS, "padding", batch=32, heads=12, **BF16),
    "opt": Case(512, 512, CAUSAL, batch=8, heads=12, **BF16),
    "vit": Case(197, 197, CLIPPED, batch=32, heads=6, **BF16),
    "float32": Case(512, 512, DROPS, "segments", True, batch=8, heads=12, width=64),
    "long": Case(4096, 4096, CAUSAL, batch=8, heads=12, **BF16),
    "long, plain": Case(4096, 4096, Scheme(0.125), "segments", True, batch=8, heads=4, **BF16),
    "long, float32": Case(3000, 3100, CAUSAL, "padding", True, (0, 0, 9), batch=8, width=128),
}


def compiled(case: Case, device: jax.Device):
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = (
        array((case.batch, n, case.heads, case.width), case.dtype)
        for n in (case.queries, case.keys)
    )
    ids = [array((case.batch, n), jnp.int32) for n in (case.queries, case.keys)]
    extras = Extras(
        *(ids if case.mask != "none" else (None, None)),
        sink=array((case.heads,), jnp.float32) if case.sink else None,
        seed=array((2,), jnp.uint32) if case.scheme.dropout_rate else None,
        first=array((3,), jnp.int32) if case.first else None,
    )

    def gradients(q, k, v, extras, d_out):
        def attend(q, k, v, sink):
            return fused_attention("tpu", case.scheme, q, k, v, extras._replace(sink=sink))

        out, vjp = jax.vjp(attend, q, k, v, extras.sink)
        return out, vjp(d_out)

    return jax.jit(gradients).lower(q, k, k, extras, q).compile()


def main() -> None:
    device = devices_of(sys.argv[1])[0]
    found = {}
    for name, case in PROGRAMS.items():
        program = compiled(case, device)
        sizes = program.memory_analysis()
        found[name] = {
            "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
            "temporaries": sizes.temp_size_in_bytes,
            "operands": sizes.argument_size_in_bytes,
            "scores": case.batch * case.heads * case.queries * case.keys * 4,
        }
        print(name, found[name], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
