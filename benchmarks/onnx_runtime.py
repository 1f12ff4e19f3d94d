"""What W8A8 saves in ONNX Runtime on a CPU: time and file against the float export, side by side.

    python -m benchmarks.onnx_runtime [--family=bert --batch_size=8 --seq_len=128 --threads=2]

BERT-base, OPT-125m or ViT-S/16 with random weights, ranges calibrated on one random batch,
everything quantized. Both sessions are timed in turn; printed are medians and their ratio.
"""

import statistics
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import onnxruntime
from absl import app, flags

from quantizable_flax.config import default_config
from quantizable_flax.models.build import build_model, with_quant
from quantizable_flax.onnx.write import to_onnx
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.quantization.spec import QuantSpec

FAMILY = flags.DEFINE_enum("family", "bert", ["bert", "opt", "vit"], "At the size of the paper.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Examples in a batch.", lower_bound=1)
SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens of a text.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "Of each session.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 8, "Timed rounds.", lower_bound=1)


def random_batch(config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A batch of the model, and what its graph is given of it."""
    rng, model, size = np.random.default_rng(0), config.model, BATCH_SIZE.value
    if FAMILY.value == "vit":
        shape = (size, model.image_size, model.image_size, model.channels)
        images = rng.normal(size=shape).astype(np.float32)
        return {"images": images}, {"pixel_values": images.transpose(0, 3, 1, 2)}
    ids = rng.integers(5, model.vocab_size, (size, SEQ_LEN.value))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch = {"input_ids": ids.astype(np.int32), "labels": ids.astype(np.int32)}
    if FAMILY.value == "bert":
        return batch, {**given, "token_type_ids": 0 * ids}
    empty = np.zeros((size, model.num_heads, 0, model.hidden_size // model.num_heads), np.float32)
    names = [f"{i}.{name}" for i in range(model.num_layers) for name in ("key", "value")]
    return batch, given | {f"past_key_values.{name}": empty for name in names}


def sessions(config, batch, folder: Path) -> dict[str, tuple[onnxruntime.InferenceSession, int]]:
    """Name -> (session, bytes of its file)."""
    model = build_model(config)
    variables = jax.jit(model.init, static_argnames="method")(
        jax.random.key(0), model.example_batch(), method="loss"
    )
    params = nn.meta.unbox(variables["params"])
    quantized = with_quant(model, QuantSpec(head=True))
    ranges = calibrate(quantized, params, [batch])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS.value
    found = {}
    for name, graph in (("float32", (model, params)), ("w8a8", (quantized, params, ranges))):
        path = folder / f"{name}.onnx"
        path.write_bytes(to_onnx(*graph).model.SerializeToString())
        found[name] = (onnxruntime.InferenceSession(str(path), options), path.stat().st_size)
    return found


def main(_: list[str]) -> None:
    """Prints seconds and megabytes of both, and ratios."""
    config = default_config(FAMILY.value)
    batch, given = random_batch(config)
    with tempfile.TemporaryDirectory() as folder:
        found = sessions(config, batch, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(ROUNDS.value + 1):
            for name, (session, _) in found.items():
                start = time.perf_counter()
                session.run(["logits"], given)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, (_, size) in found.items():
        print(f"{name:8} {medians[name]:.3f} s {size / 1e6:7.1f} MB")
    speed = medians["float32"] / medians["w8a8"]
    share = found["w8a8"][1] / found["float32"][1]
    print(f"w8a8 is {speed:.2f} times as fast, its file {share:.3f} of the float one")


if __name__ == "__main__":
    app.run(main)
