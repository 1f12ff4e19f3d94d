"""Makes tests/goldens/pretrained.npz: python tests/make_pretrained_goldens.py, by hand.

Needs PyTorch and transformers (5.24). Of each architecture the file holds its config.json as
transformers writes it, the names and shapes of its tensors, and what it computes; the weights are
drawn again by `drawn` below, so that they need no room.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "goldens" / "pretrained.npz"
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 14,
}
DISTILBERT = {
    "vocab_size": 40,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 14,
}
OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 14,
    "word_embed_proj_dim": 16,
}
POST_LN = {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
CLASSES = {"num_labels": 3}
CASES = {
    "BertForMaskedLM": ("BertConfig", TEXT),
    "BertForPreTraining": ("BertConfig", TEXT),
    "BertForSequenceClassification": ("BertConfig", TEXT | CLASSES),
    "BertModel": ("BertConfig", TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", TEXT | {"layer_norm_eps": 1e-5}),
    "RobertaForSequenceClassification": ("RobertaConfig", TEXT | CLASSES),
    "RobertaModel": ("RobertaConfig", TEXT | {"type_vocab_size": 1}),
    "XLMRobertaModel": ("XLMRobertaConfig", TEXT | {"type_vocab_size": 1}),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTILBERT),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT | CLASSES),
    "DistilBertModel": ("DistilBertConfig", DISTILBERT),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "OPTModel": ("OPTConfig", POST_LN),
    "ViTForImageClassification": ("ViTConfig", IMAGES | CLASSES),
    "ViTModel": ("ViTConfig", IMAGES | {"layer_norm_eps": 1e-6}),
    "DeiTForImageClassification": ("DeiTConfig", IMAGES | CLASSES),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", IMAGES | CLASSES),
    "DeiTModel": ("DeiTConfig", IMAGES),
}


def drawn(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights of these names and shapes, always the same."""
    rng = np.random.RandomState(0)  # its streams never change
    weights = {}
    for name, shape in shapes.items():
        values = 0.2 * rng.normal(size=shape)
        if "norm" in name.lower() and name.endswith("weight"):
            values += 1.0
        weights[name] = values.astype(np.float32)
    return weights


def inputs() -> dict[str, np.ndarray]:
    """Text with padding on the right (token 1, which is RoBERTa's padding), and images."""
    rng = np.random.RandomState(1)
    ids = rng.randint(4, 40, size=(2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    ids[1, 6:] = 1
    pixels = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def case(name: str, config_name: str, sizes: dict) -> tuple[dict, dict[str, np.ndarray]]:
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    kind = getattr(transformers, name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        kind(getattr(transformers, config_name)(**sizes)).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        shapes = {key: list(value.shape) for key, value in load_file(file).items()}
        save_file(drawn(shapes), file, {"format": "pt"})
        model = kind.from_pretrained(folder).eval()
    given = {key: torch.tensor(value) for key, value in inputs().items()}
    if model.main_input_name == "pixel_values":
        arguments = {"pixel_values": given["pixel_values"]}
    else:
        arguments = {key: given[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        result = model(**arguments)
    kept = ("logits", "prediction_logits", "last_hidden_state", "pooler_output")
    outputs = {key: result[key].numpy() for key in kept if result.get(key) is not None}
    return {"config": config, "shapes": shapes}, outputs


def main() -> None:
    described, arrays = {}, {}
    for name, (config_name, sizes) in CASES.items():
        described[name], outputs = case(name, config_name, sizes)
        arrays |= {f"{name}/{key}": value for key, value in outputs.items()}
    np.savez_compressed(GOLDEN, config=json.dumps(described), **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
