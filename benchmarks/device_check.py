"""What a device multiplies, and whether its float32 is float32.

    python -m benchmarks.device_check [--size=8192 --layers=4]

The rate of large square products by type, the ceiling of everything else on the card; then logits
of the three families (base width, random weights of sigma 0.05) on this device against the CPU's:
in float32, in simulated W8A8 and on integers with the ranges of the CPU. A float32 product at
JAX's own default precision stands beside them, for it shows what the backend would do unasked.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_cost import random_batch
from quantizable_flax.config import default_config
from quantizable_flax.config.defaults import FAMILIES
from quantizable_flax.models.build import build_model, with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.int8 import to_int8
from quantizable_flax.quantization.sites import RANGES
from quantizable_flax.quantization.spec import QuantSpec, parse_coverage

HIGHEST = jax.lax.Precision.HIGHEST


def rates(size: int) -> None:
    """Prints TFLOP/s (TOP/s) of square products."""
    kinds = {
        "bf16": (jnp.bfloat16, None, jnp.bfloat16),
        "f32, backend's default": (jnp.float32, None, jnp.float32),
        "f32, highest": (jnp.float32, HIGHEST, jnp.float32),
        "int8": (jnp.int8, None, jnp.int32),
    }
    key = jax.random.key(0)
    for name, (dtype, precision, out) in kinds.items():
        values = 20.0 * jax.random.normal(key, (size, size))
        x, y = values.astype(dtype), values.T.astype(dtype)
        dot = jax.jit(
            lambda x, y, p=precision, o=out: jnp.dot(x, y, precision=p, preferred_element_type=o)
        )
        jax.block_until_ready(dot(x, y))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                result = dot(x, y)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / 4)
        rate = 2.0 * size**3 / statistics.median(times) / 1e12
        print(f"product of {size} x {size}, {name:23} {rate:8.1f} T/s")


def deviation(found, expected) -> str:
    """The largest difference as a share of the largest value."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return f"{np.abs(found - expected).max() / np.abs(expected).max():.2g}"


def programs(family: str, layers: int):
    """Name -> (model, variables), and the inputs of all; made on the CPU."""
    config = default_config(family)
    config.model.num_layers = layers
    config.model.initializer_range = 0.05
    config.train.batch_size = 2
    batch = random_batch(config)
    model = build_model(config)
    params = jax.jit(lambda key: model.init(key, batch, method="loss"))(jax.random.key(0))
    params = jax.tree.map(
        lambda x: x.unbox(), params["params"], is_leaf=lambda x: hasattr(x, "unbox")
    )
    quantized = with_quant(model, QuantSpec(**parse_coverage("all")))
    ranges = calibrate(quantized, params, [batch])
    native, codes = to_int8(quantized, params, ranges)
    return {
        "float32": (model, {"params": params}),
        "simulated W8A8": (quantized, {"params": params, RANGES: ranges}),
        "int8": (native, {"params": codes}),
    }, batch["images" if family == "vit" else "input_ids"]


def parity(family: str, layers: int) -> None:
    """Prints how far this device's logits are from the CPU's."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        models, inputs = programs(family, layers)
    shown = []
    for name, (model, variables) in models.items():
        logits = []
        for where in (cpu, device):
            with jax.default_device(where):  # kernels are chosen by it
                run = jax.jit(model.apply)
                logits.append(np.asarray(run(*jax.device_put((variables, inputs), where))))
        same = np.mean(logits[0] == logits[1])
        shown.append(f"{name} {deviation(logits[1], logits[0])} ({100 * same:.0f} % equal)")
    print(f"logits of {family}, {layers} layers, against the CPU's: {', '.join(shown)}")


def main() -> None:
    """Prints all lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    rates(options.size)
    x = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    by_default, highest = jnp.dot(x, x.T), jnp.dot(x, x.T, precision=HIGHEST)
    print(
        f"a float32 product off by {deviation(by_default, exact)} at the backend's default, by "
        f"{deviation(highest, exact)} at the highest precision"
    )
    for family in FAMILIES:
        parity(family, options.layers)


if __name__ == "__main__":
    main()
