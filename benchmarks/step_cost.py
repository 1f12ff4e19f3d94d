"""What clipped softmax and gates cost: training step and evaluation forward over vanilla.

    python -m benchmarks.step_cost [--family=opt --hidden=256 --layers=4 --seq_len=128]

With --torch (needs torch and transformers, and OMP_WAIT_POLICY=passive, or its threads spin while
ours compute) transformers' BERT of the same sizes runs in turn too.

ViT takes images of sqrt(seq_len) * 16 pixels in patches of 16, so that it has seq_len patches.

All variants are timed in turn, round after round, so that a machine that slows down slows all of
them; printed are medians and the ratio to vanilla in the same run.
"""

import argparse
import math
import statistics
import time

import jax
import numpy as np

from quantizable_flax.config import default_config
from quantizable_flax.config.defaults import FAMILIES
from quantizable_flax.evaluation.step import make_eval_step
from quantizable_flax.models.build import build_model, with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step

CLIPPED = {"softmax": "clipped", "gamma": -0.025}
# Of model.attention, and train.attention_kernel.
VARIANTS: dict[str, tuple[dict, str]] = {
    "vanilla": ({}, "auto"),
    "clipped softmax": (CLIPPED, "auto"),
    "linear gate": ({"gate": "linear"}, "auto"),
    "mlp gate": ({"gate": "mlp"}, "auto"),
    "vanilla, unfused": ({}, "unfused"),
    "clipped, unfused": (CLIPPED, "unfused"),
}


def configure(options: argparse.Namespace, attention: dict, kernel: str):
    """The configuration of one variant, loss over all positions."""
    config = default_config(options.family)
    config.model.update(
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        hidden_dropout=options.dropout,
        attention_dropout=options.dropout,
    )
    if options.family == "vit":
        config.model.image_size = config.model.patch_size * math.isqrt(options.seq_len)
    else:
        config.model.vocab_size = 8192
        config.data.seq_len = options.seq_len
    config.train.batch_size = options.batch_size
    config.model.attention.update(attention)
    config.train.attention_kernel = kernel
    return config


def random_batch(config) -> dict[str, np.ndarray]:
    """One batch: 15 % of the tokens labelled for BERT, all for OPT; random images for ViT."""
    rng, size, model = np.random.default_rng(0), config.train.batch_size, config.model
    if model.name == "vit":
        shape = (size, model.image_size, model.image_size, model.channels)
        labels = rng.integers(model.num_classes, size=size, dtype=np.int32)
        return {"images": rng.integers(256, size=shape, dtype=np.uint8), "labels": labels}
    ids = rng.integers(5, model.vocab_size, (size, config.data.seq_len), dtype=np.int32)
    labelled = rng.random(ids.shape) < (0.15 if model.name == "bert" else 1.0)
    return {"input_ids": ids, "labels": np.where(labelled, ids, np.int32(-100))}


def programs(config) -> dict:
    """Name -> function that runs one training step, one forward, or one simulated W8A8 forward."""
    mesh = make_mesh(config.mesh)
    model, optimizer = build_model(config), make_optimizer(config, 1000)
    batch = put_batch(random_batch(config), mesh)
    state = init_state(model, optimizer, batch, 0, mesh)
    params = jax.tree.map(np.asarray, state.params)
    train_step = make_train_step(model, optimizer, config, mesh, state)
    eval_step = make_eval_step(model)
    quantized = with_quant(model, QuantSpec())
    ranges = calibrate(quantized, params, [batch])
    quantized_step = make_eval_step(quantized)
    kept = {"state": state, "params": jax.device_put(params)}

    def train():
        kept["state"], metrics = train_step(kept["state"], batch)
        jax.block_until_ready(metrics)

    return {
        "training step": train,
        "forward": lambda: jax.block_until_ready(eval_step(kept["params"], {}, batch)),
        "simulated W8A8": lambda: jax.block_until_ready(
            quantized_step(kept["params"], ranges, batch)
        ),
    }


def main() -> None:
    """Times every program of every variant and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="bert")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--torch", action="store_true", help="BERT of PyTorch beside ours")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    variants = {name: programs(configure(options, *variant)) for name, variant in VARIANTS.items()}
    if options.torch:
        from benchmarks.torch_step import small_bert

        batch = random_batch(configure(options, *VARIANTS["vanilla"]))
        variants["PyTorch"] = small_bert(options, batch)
    times: dict = {}
    for round_index in range(options.rounds + 2):
        for variant, runs in variants.items():
            for program, run in runs.items():
                start = time.perf_counter()
                run()
                if round_index >= 2:  # two rounds to warm up
                    elapsed = time.perf_counter() - start
                    times.setdefault((program, variant), []).append(elapsed)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(options)}")
    for program in ("training step", "forward", "simulated W8A8"):
        base = statistics.median(times[program, "vanilla"])
        for variant in variants:
            if (program, variant) not in times:
                continue
            median = statistics.median(times[program, variant])
            print(
                f"{program:15} {variant:16} {median * 1e3:8.1f} ms  {median / base:.3f} x vanilla"
            )


if __name__ == "__main__":
    main()
