"""Forward passes as people serve them on a CPU: by XLA, ONNX Runtime and PyTorch, side by side.

    python -m benchmarks.serving [--family=bert --batch_sizes=1,8,32 --seq_len=128 --rounds=7]

BERT-base without a head, OPT-125m with the logits of all positions, ViT-S/16; random weights,
everything quantized, ranges from one random batch. ONNX Runtime runs our float file, our W8A8 file,
and what its own tools make of the float one: weights alone beforehand (dynamic) and ranges from one
batch (static). Needs onnx and onnxruntime; PyTorch runs too where torch and transformers are
installed (with OMP_WAIT_POLICY=passive, or its threads spin while others compute).

All programs of a batch size run in turn, round after round; printed are medians, the spread of the
middle half of the rounds, and ratios to our float32. `benchmarks.without_amx` takes AMX away.
"""

import argparse
import importlib.util
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from onnxruntime import quantization

from benchmarks.int8 import configure, forward, measure, random_batch, variants
from quantizable_flax.config.defaults import FAMILIES
from quantizable_flax.onnx.write import to_onnx

Run = Callable[[], Any]
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def given(batch: dict[str, Any], config) -> dict[str, np.ndarray]:
    """A batch of ours as the inputs of our ONNX files."""
    if "images" in batch:
        pixels = np.asarray(batch["images"], np.float32).transpose(0, 3, 1, 2)
        return {"pixel_values": pixels / 127.5 - 1.0}
    ids, model = np.asarray(batch["input_ids"], np.int64), config.model
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if model.name == "bert":
        return found | {"token_type_ids": 0 * ids}
    shape = (len(ids), model.num_heads, 0, model.hidden_size // model.num_heads)
    names = [f"{i}.{name}" for i in range(model.num_layers) for name in ("key", "value")]
    return found | {f"past_key_values.{name}": np.zeros(shape, np.float32) for name in names}


class OneBatch(quantization.CalibrationDataReader):
    """What ONNX Runtime's tool reads its ranges from."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        """Reads these inputs, once."""
        self._left: Iterator[dict[str, np.ndarray]] = iter([inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next inputs, None behind the last."""
        return next(self._left, None)


def onnx_files(models: dict, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, Path]:
    """Name -> file: ours in float and W8A8, and both that ONNX Runtime's tools make."""
    (model, variables), (quantized, simulated) = models["f32"], models["simulated"]
    names = ("ONNX f32", "ONNX W8A8, ours", "ONNX dynamic, theirs", "ONNX static, theirs")
    files = {name: folder / f"{i}.onnx" for i, name in enumerate(names)}
    plain, ours, dynamic, static = files.values()
    plain.write_bytes(to_onnx(model, variables["params"]).model.SerializeToString())
    graph = to_onnx(quantized, simulated["params"], simulated["ranges"]).model
    ours.write_bytes(graph.SerializeToString())
    logging.getLogger().setLevel(logging.ERROR)  # each node that stays in float is a warning
    quantization.quantize_dynamic(plain, dynamic, weight_type=quantization.QuantType.QInt8)
    quantization.quantize_static(
        plain,
        static,
        OneBatch(inputs),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return files


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Of the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def torch_run(family: str, inputs: dict[str, np.ndarray], layers: int) -> Run:
    """PyTorch's forward pass in float32, by transformers."""
    import torch
    import transformers

    sizes = {"num_hidden_layers": layers}
    if family == "vit":
        sizes |= {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        config = transformers.ViTConfig(num_labels=1000, **sizes)
        model = transformers.ViTForImageClassification(config)
    elif family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    else:
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))
    wanted = ("input_ids", "attention_mask", "pixel_values")
    tensors = {name: torch.as_tensor(inputs[name]) for name in wanted if name in inputs}
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(**tensors)

    return run


def report(size: int, times: dict[str, list[float]], megabytes: dict[str, float]) -> None:
    """Prints one line for each program."""
    base = 1e3 * statistics.median(times["XLA f32"])
    for name, seconds in times.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
        file = f"{megabytes[name]:7.1f} MB" if name in megabytes else ""
        print(
            f"batch {size:3}  {name:21} {median:8.1f} ms  ({low:.1f} to {high:.1f})"
            f"  {median / base:.3f} x XLA f32  {file}",
            flush=True,
        )


def features() -> str:
    """The CPU's name, and what of its instructions matters here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    known = [name for name in FEATURES if name in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'a CPU')}, {os.cpu_count()} cores seen: {' '.join(known)}"


def main() -> None:
    """Times every program of every batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="bert")
    parser.add_argument("--batch_sizes", default="1,8,32")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--layers", type=int, default=0, help="0 for all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    config = configure(options.family, options.layers, options.seq_len)
    if options.family == "bert":
        config.model.head = "none"
    models = variants(config, random_batch(config, 2))
    print(f"{features()}; jax {jax.__version__}, onnxruntime {onnxruntime.__version__}, {options}")
    with tempfile.TemporaryDirectory() as folder:
        files = onnx_files(models, given(random_batch(config, 2), config), Path(folder))
        megabytes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
        sessions = {name: session(path, options.threads) for name, path in files.items()}
    for size in map(int, options.batch_sizes.split(",")):
        batch = random_batch(config, size)
        ours = batch["images" if options.family == "vit" else "input_ids"]
        inputs = given(batch, config)
        runs: dict[str, Run] = {
            f"XLA {name}": forward(*models[name], ours) for name in ("f32", "bf16", "int8")
        }
        for name, found in sessions.items():
            runs[name] = lambda found=found, inputs=inputs: found.run(None, inputs)
        if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            runs["PyTorch f32"] = torch_run(options.family, inputs, config.model.num_layers)
        report(size, measure(runs, options.rounds), megabytes)


if __name__ == "__main__":
    main()
