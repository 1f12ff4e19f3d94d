"""The real examples that a report looks at, and what their tokens are called."""

import dataclasses
from typing import Any

import numpy as np

from quantizable_flax.data.task import Batch
from quantizable_flax.report.measured import Picture

SPACES = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})
MOST_PIXELS = 96  # of a picture's side; what is larger is thinned


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Examples without fillers.

    Attributes:
      batch: as `model.loss` takes it.
      visible_BxT: bool, True for tokens that are no padding; of the model's tokens.
      tokens_BxT: what they are called: their text, or the place of the patch.
      pictures: of each example, none of text.
    """

    batch: Batch
    visible_BxT: np.ndarray
    tokens_BxT: list[list[str]]
    pictures: list[Picture]


def make_inputs(model: Any, task: Any, batch: Batch, most_tokens: int) -> Inputs:
    """Returns the first examples of a batch, fillers left out, that have so many tokens together.

    Args:
      model: of a family.
      task: its data, with a `tokenizer` where it reads text.
      batch: [B, ...].
      most_tokens: one example is taken whatever its length.
    """
    weight_B = batch.get("example_weight")
    batch = {key: np.asarray(x) for key, x in batch.items() if key != "example_weight"}
    if weight_B is not None:
        batch = {key: x[np.asarray(weight_B) > 0] for key, x in batch.items()}
    if "images" in batch:
        return _of_images(model, batch, most_tokens)
    rows = max(1, most_tokens // batch["input_ids"].shape[1])
    batch = {key: x[:rows] for key, x in batch.items()}
    ids_BxT = batch["input_ids"]
    visible_BxT = batch.get("attention_mask", np.ones_like(ids_BxT)).astype(bool)
    texts = {int(i): text_of(task.tokenizer, int(i)) for i in np.unique(ids_BxT)}
    first = registers(model)
    tokens_BxT = [[*first, *(texts[int(i)] for i in ids_T)] for ids_T in ids_BxT]
    visible_BxT = np.pad(visible_BxT, ((0, 0), (len(first), 0)), constant_values=True)
    return Inputs(batch, visible_BxT, tokens_BxT, [])


def registers(model: Any) -> list[str]:
    """What its registers are called; a model of one's own may know of none."""
    count = getattr(getattr(model, "config", None), "num_registers", 0)
    return [f"[register {i}]" for i in range(count)]


def text_of(tokenizer: Any, token: int) -> str:
    """A token's text, with signs for the spaces in it; its number where it has none."""
    return tokenizer.decode([token]).translate(SPACES) or f"#{token}"


def _of_images(model: Any, batch: Batch, most_tokens: int) -> Inputs:
    config = model.config
    side = config.image_size // config.patch_size
    first = ["[class]"] + ["[distillation]"] * (config.distillation != "none")
    first += registers(model)
    places = [f"patch {y},{x}" for y in range(side) for x in range(side)]
    tokens_T = first + places
    rows = max(1, most_tokens // len(tokens_T))
    batch = {key: x[:rows] for key, x in batch.items()}
    pictures = [Picture(thumbnail(pixels), (side, side), len(first)) for pixels in batch["images"]]
    count = len(pictures)
    return Inputs(batch, np.ones((count, len(tokens_T)), bool), [tokens_T] * count, pictures)


def thumbnail(pixels_HxWxC: np.ndarray) -> np.ndarray:
    """Three channels of uint8, with every n-th pixel of a large image: [h, w, 3]."""
    skip = -(-max(pixels_HxWxC.shape[:2]) // MOST_PIXELS)
    thinned = pixels_HxWxC[::skip, ::skip].astype(np.uint8)
    return np.repeat(thinned, 3, axis=2) if thinned.shape[2] == 1 else thinned
