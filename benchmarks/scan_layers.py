"""A loop over layers in the program against layers written out: the choice of a checkpoint layout.

    python -m benchmarks.scan_layers [--hidden=512 --layers=12 --topology=v5e:2x2]

The gradient of all layers of an OPT is compiled twice: with parameters `layer_0`, `layer_1`, ...
one after the other, and with all layers stacked in one array per parameter and `jax.lax.scan` over
them. Printed are compile seconds, bytes of temporaries and, on this machine's device, the median
step of both, run in turn. With --topology the programs are compiled for the first device of a TPU
(needs libtpu) and not run.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.step_cost import configure
from quantizable_flax.aot.topology import devices_of, prepare
from quantizable_flax.models.build import build_model
from quantizable_flax.models.opt import OptLayer
from quantizable_flax.models.transformer import REMAT
from quantizable_flax.nn.mask import Mask


def make_programs(options: argparse.Namespace) -> dict:
    """Name -> (jitted gradient, function that makes its parameters of those of the layers)."""
    config = configure(argparse.Namespace(**vars(options), family="opt", dropout=0.0), {}, "auto")
    config.model.dtype = options.dtype
    layer = OptLayer(build_model(config).config)
    mask = Mask(causal=True)

    def call(x, params):
        return layer.apply({"params": params}, x, mask, train=True)

    if options.remat != "none":
        call = jax.checkpoint(call, policy=REMAT[options.remat])

    def written_out(layers, x):
        for params in layers:
            x = call(x, params)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def scanned(stacked, x):
        x, _ = jax.lax.scan(lambda x, params: (call(x, params), None), x, stacked)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def init(key):
        x = jnp.zeros((1, options.seq_len, options.hidden))
        keys = jax.random.split(key, options.layers)
        unboxed = jax.tree.map(
            lambda p: p.value,
            [layer.init(k, x, mask, train=False)["params"] for k in keys],
            is_leaf=lambda p: hasattr(p, "value"),
        )
        return unboxed

    def stack(layers):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    return {
        "written out": (jax.jit(jax.grad(written_out)), init),
        "scanned": (jax.jit(jax.grad(scanned)), lambda key: stack(init(key))),
    }


def compiled(options: argparse.Namespace, device) -> dict:
    """Name -> (executable, parameters' init, compile seconds)."""
    sharding, built = SingleDeviceSharding(device), {}
    shape = (options.batch_size, options.seq_len, options.hidden)
    x = jax.ShapeDtypeStruct(shape, options.dtype, sharding=sharding)
    for name, (grad, init) in make_programs(options).items():
        params = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
            jax.eval_shape(init, jax.random.key(0)),
        )
        began = time.perf_counter()
        executable = grad.lower(params, x).compile()
        built[name] = executable, init, time.perf_counter() - began
    return built


def step_seconds(options: argparse.Namespace, built: dict) -> dict[str, float]:
    """Name -> median seconds of a step, all of them in turn."""
    shape = (options.batch_size, options.seq_len, options.hidden)
    x = jax.random.normal(jax.random.key(1), shape, options.dtype)
    params = {name: jax.jit(init)(jax.random.key(0)) for name, (_, init, _) in built.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(options.rounds + 1):
        for name, (executable, _, _) in built.items():
            began = time.perf_counter()
            jax.block_until_ready(executable(params[name], x))
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Compiles both, runs them where they can run, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", choices=REMAT, default="none")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--topology", help="a TPU to compile for, e.g. v5e:2x2")
    options = parser.parse_args()
    if options.topology:
        prepare()
    device = devices_of(options.topology)[0] if options.topology else jax.devices()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    built = compiled(options, device)
    seconds = {} if options.topology else step_seconds(options, built)
    print(f"{options.layers} layers of {options.hidden} on {device.device_kind}")
    print(f"{'':12} {'compile s':>10} {'temporaries MB':>15} {'step ms':>8}")
    for name, (executable, _, compile_seconds) in built.items():
        temporaries = executable.memory_analysis().temp_size_in_bytes / 1e6
        step = f"{1e3 * seconds[name]:8.1f}" if seconds else f"{'-':>8}"
        print(f"{name:12} {compile_seconds:10.1f} {temporaries:15.1f} {step}")


if __name__ == "__main__":
    main()
