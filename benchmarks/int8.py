"""What integers save: forward passes in f32, bf16, simulated W8A8 and INT8, side by side.

    python -m benchmarks.int8 [--family=bert --batch_size=8 --seq_len=128 --setup=all]

BERT-base, OPT-125m or ViT-S/16 with random weights, ranges calibrated on one random batch. All
programs are timed in turn, round after round, so that a machine that slows down slows all of
them; printed are medians, and ratios to f32 in the same run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from quantizable_flax.config import default_config
from quantizable_flax.config.defaults import FAMILIES
from quantizable_flax.models.build import build_model, with_config, with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.int8 import size_in_bytes, to_int8
from quantizable_flax.quantization.sites import RANGES
from quantizable_flax.quantization.spec import QuantSpec, parse_coverage

FLAGS = flags.FLAGS
WARM_UP = 2  # rounds


def configure(family: str, layers: int = 0, seq_len: int = 128):
    """The family's defaults, which are base models, for texts of a length; 0 layers for all."""
    config = default_config(family)
    if layers:
        config.model.num_layers = layers
    if family != "vit":
        config.data.seq_len = seq_len
    return config


def random_batch(config, size: int) -> dict[str, jax.Array]:
    """Random tokens, all of them labelled, or random images."""
    rng, model = np.random.default_rng(0), config.model
    if model.name == "vit":
        shape = (size, model.image_size, model.image_size, model.channels)
        images = rng.integers(256, size=shape, dtype=np.uint8)
        return jax.device_put({"images": images, "labels": np.zeros(size, np.int32)})
    ids = rng.integers(5, model.vocab_size, (size, config.data.seq_len), dtype=np.int32)
    return jax.device_put({"input_ids": ids, "labels": ids})


def variants(config, batch, coverage: str = "all") -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Name -> (model, variables)."""
    model = build_model(config)

    @jax.jit
    def init(key):
        return nn.meta.unbox(model.init(key, model.example_batch(), method="loss"))["params"]

    params = init(jax.random.key(0))
    simulated = with_quant(model, QuantSpec(**parse_coverage(coverage)))
    ranges = calibrate(simulated, params, [batch])
    native, codes = to_int8(simulated, params, ranges)
    in_bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return {
        "f32": (model, {"params": params}),
        "bf16": (with_config(model, dtype=jnp.bfloat16), {"params": in_bf16}),
        "simulated": (simulated, {"params": params, RANGES: ranges}),
        "int8": (native, {"params": codes}),
    }


def forward(model: nn.Module, variables: dict[str, Any], inputs: jax.Array) -> Callable:
    """A compiled forward pass without arguments; variables are arguments of the program."""
    compiled = jax.jit(model.apply).lower(variables, inputs).compile()
    return lambda: jax.block_until_ready(compiled(variables, inputs))


def measure(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each timed run, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(WARM_UP + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_index >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def main(_: list[str]) -> None:
    """Times every program and prints one table."""
    config = configure(FLAGS.family, FLAGS.layers, FLAGS.seq_len)
    batch = random_batch(config, FLAGS.batch_size)
    inputs = batch["images" if FLAGS.family == "vit" else "input_ids"]
    models = variants(config, batch, FLAGS.setup)
    runs = {name: forward(*pair, inputs) for name, pair in models.items()}
    times = measure(runs, FLAGS.rounds)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    sizes = {name: size_in_bytes(variables["params"]) for name, (_, variables) in models.items()}
    device = jax.devices()[0].device_kind
    print(
        f"{FLAGS.family}, {config.model.num_layers} layers, input {inputs.shape}, quant setup "
        f"{FLAGS.setup}; {device}, jax {jax.__version__}, {FLAGS.rounds} rounds"
    )
    for name in runs:
        print(
            f"{name:10} {seconds[name] * 1e3:9.2f} ms  {seconds[name] / seconds['f32']:.3f} x f32  "
            f"parameters {sizes[name] / 1e6:7.1f} MB  {sizes[name] / sizes['f32']:.3f} x f32"
        )
    exact, simulated, native = (np.asarray(runs[name]()) for name in ("f32", "simulated", "int8"))
    largest = np.abs(simulated).max()
    print(
        "largest difference of logits, relative to the largest logit: int8 to simulated "
        f"{np.abs(native - simulated).max() / largest:.2g}, int8 to f32 "
        f"{np.abs(native - exact).max() / largest:.2g}"
    )


def define_flags() -> None:
    """Not on import: `benchmarks.serving` has flags of the same names."""
    flags.DEFINE_enum("family", "bert", FAMILIES, "Which model, at the size of the paper.")
    flags.DEFINE_integer("batch_size", 8, "Examples in a batch.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 128, "Tokens of a text; images have 197.", lower_bound=1)
    flags.DEFINE_string("setup", "all", "What is quantized, as config.quant.coverage.")
    flags.DEFINE_integer("layers", 0, "Layers of the model, 0 for all.")
    flags.DEFINE_integer("rounds", 10, "Timed rounds.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
