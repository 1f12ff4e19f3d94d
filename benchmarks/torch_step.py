"""The same training step in PyTorch: transformers' models, bfloat16 autocast, SDPA, torch.compile.

    python -m benchmarks.torch_step [--family=bert --batch_size=256 --steps=10 --rounds=5]

Needs torch and transformers, which this package does not. Sizes, dropout, AdamW and the random
batch are those of `benchmarks.train_step`; BERT's logits are of all positions.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers

BATCHES = {"bert": 256, "opt": 48, "vit": 256}


def small_bert(sizes: argparse.Namespace, batch: dict) -> dict[str, Callable[[], None]]:
    """Name -> a training step and an evaluation forward in float32, for `benchmarks.step_cost`.

    Args:
      sizes: its options.
      batch: numpy arrays, `input_ids` and `labels`.
    """
    config = transformers.BertConfig(
        vocab_size=8192,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        intermediate_size=4 * sizes.hidden,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
    )
    model = transformers.BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tensors = {name: torch.as_tensor(array).long() for name, array in batch.items()}

    def train() -> None:
        model.train()
        model(**tensors).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            model(**tensors).loss.item()

    return {"training step": train, "forward": forward}


def model_and_batch(options: argparse.Namespace, device: str):
    """A model as published, in training mode, and one batch on the device."""
    family, size = options.family, options.batch_size or BATCHES[options.family]
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        config = transformers.ViTConfig(
            hidden_size=384,
            num_attention_heads=6,
            intermediate_size=1536,
            num_labels=1000,
            **layers,
        )
        model = transformers.ViTForImageClassification(config)
        batch = {
            "pixel_values": torch.randn(size, 3, 224, 224, generator=generator),
            "labels": torch.randint(1000, (size,), generator=generator),
        }
    else:
        length = {"bert": 128, "opt": 512}[family]
        if family == "bert":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**layers))
        else:
            config = transformers.OPTConfig(dropout=0.1, attention_dropout=0.0, **layers)
            model = transformers.OPTForCausalLM(config)
        ids = torch.randint(5, 30000, (size, length), generator=generator)
        labelled = torch.rand(ids.shape, generator=generator) < (0.15 if family == "bert" else 1.0)
        batch = {"input_ids": ids, "labels": torch.where(labelled, ids, -100)}
    return model.to(device).train(), {name: value.to(device) for name, value in batch.items()}


def main() -> None:
    """Times plain and compiled steps in turn and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=BATCHES, default="bert")
    parser.add_argument("--batch_size", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model, batch = model_and_batch(options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    forwards = {"PyTorch": model, "PyTorch compiled": torch.compile(model)}

    def run(forward, steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = forward(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits

    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for round_index in range(options.rounds + 1):
        for name, forward in forwards.items():
            start = time.perf_counter()
            run(forward, options.steps if round_index else 3)
            if round_index:
                seconds[name].append((time.perf_counter() - start) / options.steps)
    card = torch.cuda.get_device_name() if device == "cuda" else device
    print(
        f"{options.family}, {card}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {model.config._attn_implementation}, {vars(options)}"
    )
    size = next(iter(batch.values())).shape[0]
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = max(times) - min(times)
        print(
            f"{name:17} {median * 1e3:8.2f} ms (spread {spread * 1e3:.2f})  "
            f"{size / median:9.1f} examples/s"
        )


if __name__ == "__main__":
    main()
