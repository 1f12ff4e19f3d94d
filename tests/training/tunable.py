"""Published folders with tokenizers, and data for them: what a run may start from."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from quantizable_flax.data.text.tokenizer import Tokenizer
from tests.make_pretrained_goldens import drawn
from tests.pretrained import published
from tests.tiny import write_text

VOCAB = 300  # of the goldens' 40 no tokenizer can be made


def text_folder(folder: Path, name: str) -> str:
    """A published BERT or OPT of that architecture with a tokenizer of the text of `tests.tiny`."""
    texts = Path(write_text(folder.parent / "text.txt")).read_text().split("\n\n")
    train = Tokenizer.train_byte_bpe if name.startswith("OPT") else Tokenizer.train_wordpiece
    tokenizer = train(texts, vocab_size=VOCAB)
    config = published.config_json(name) | {"vocab_size": VOCAB, "pad_token_id": tokenizer.pad_id}
    shapes = {
        key: [VOCAB if size == 40 else size for size in shape]
        for key, shape in published.FILE.config[name]["shapes"].items()
    }
    path = published.write(folder, config, drawn(shapes))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return path


def write_images(folder: Path, count: int = 40) -> str:
    """Images of 8 x 8 in one folder, without classes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def model_folder(folder: Path, name: str) -> tuple[str, str]:
    """(published folder, data for it) of any architecture."""
    if name.startswith(("ViT", "DeiT")):
        return published.saved(folder, name), write_images(folder.parent / "images")
    return text_folder(folder, name), str(folder.parent / "text.txt")


def plant_outlier(path: str, layer: int = 0, size: float = 60.0) -> None:
    """Gives one unit of a BERT's FFN a bias, so that its residual sum has an outlier."""
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    (key,) = (k for k in tensors if k.endswith(f"encoder.layer.{layer}.output.dense.bias"))
    tensors[key] = tensors[key].copy()
    tensors[key][3] = size
    published.write(folder, config, tensors)
