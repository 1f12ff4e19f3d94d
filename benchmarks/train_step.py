"""The training step of the published recipes: milliseconds, examples a second, utilisation.

    python -m benchmarks.train_step [--family=bert --batch_size=256 --steps=10 --rounds=5]

Model, precision, dropout and optimizer are those of configs/bert_base.py (opt_125m, vit_s16), for
vanilla, clipped and gated; the batch is random and lies on the device. "all positions" is vanilla
BERT that computes the logits of every token, as PyTorch's does (`benchmarks.torch_step`). Variants
are timed in turn, round after round; printed are medians, and the ratio to vanilla in the same run.
"""

import argparse
import concurrent.futures
import importlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.step_cost import random_batch
from quantizable_flax.models.flops import step_flops
from quantizable_flax.runtime.chips import chip_of
from quantizable_flax.runtime.mesh import put_batch
from quantizable_flax.training.setup import set_up
from quantizable_flax.training.step import init_state, make_train_step

RECIPES = {"bert": "bert_base", "opt": "opt_125m", "vit": "vit_s16"}
BATCHES = {"bert": 256, "opt": 48, "vit": 256}  # of one accelerator
VARIANTS = ("vanilla", "clipped", "gated")


def configurations(options: argparse.Namespace) -> dict[str, ConfigDict]:
    """Name -> recipe, with the batch and the layers that were asked for."""
    recipe = importlib.import_module(f"configs.{RECIPES[options.family]}")
    configs = {variant: recipe.get_config(variant) for variant in VARIANTS}
    if options.family == "bert":
        configs["all positions"] = recipe.get_config("vanilla")
        configs["all positions"].model.max_predictions = 0
    for config in configs.values():
        config.train.batch_size = options.batch_size or BATCHES[options.family]
        config.model.num_layers = options.layers or config.model.num_layers
        config.train.attention_kernel = options.kernel
    return configs


def compiled(config: ConfigDict) -> Callable[[int], None]:
    """Returns what runs so many steps and waits for them."""
    mesh, model, optimizer = set_up(config)
    state = init_state(model, optimizer, model.example_batch(), config.seed, mesh)
    batch = put_batch(random_batch(config), mesh)
    step = make_train_step(model, optimizer, config, mesh, state).lower(state, batch).compile()
    kept = {"state": state}

    def run(steps: int) -> None:
        for _ in range(steps):
            kept["state"], metrics = step(kept["state"], batch)
        loss = jax.block_until_ready(metrics["loss"])
        assert np.isfinite(loss), loss

    return run


def main() -> None:
    """Compiles all variants at once, times them in turn and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=RECIPES, default="bert")
    parser.add_argument("--batch_size", type=int, default=0, help="0: that of one accelerator")
    parser.add_argument("--layers", type=int, default=0, help="0: all")
    parser.add_argument("--kernel", default="auto", help="train.attention_kernel")
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    configs = configurations(options)
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = dict(zip(configs, pool.map(compiled, configs.values()), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    compilation = time.perf_counter() - began
    for round_index in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(options.steps if round_index else 2)  # the first round warms up
            if round_index:
                seconds[name].append((time.perf_counter() - start) / options.steps)
    device = jax.devices()[0].device_kind
    chip = chip_of(device)
    print(
        f"{options.family}, {device}, jax {jax.__version__}, {vars(options)}, all compiled in "
        f"{compilation:.0f} s"
    )
    base = statistics.median(seconds["vanilla"])
    for name, config in configs.items():
        median, spread = statistics.median(seconds[name]), max(seconds[name]) - min(seconds[name])
        rate = step_flops(config) / median
        share = f"  MFU {100 * rate / chip.bf16_flops:5.1f} %" if chip else ""
        print(
            f"{name:14} {median * 1e3:8.2f} ms (spread {spread * 1e3:.2f})  "
            f"{median / base:.3f} x vanilla  {config.train.batch_size / median:9.1f} examples/s  "
            f"{rate / 1e12:7.2f} TFLOP/s{share}"
        )


if __name__ == "__main__":
    main()
