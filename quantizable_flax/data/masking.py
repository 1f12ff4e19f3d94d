"""The masked-language-model task of BERT on packed blocks."""

import grain
import numpy as np

from quantizable_flax.data.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

# The label of a position that is not predicted.
IGNORE_LABEL = -100
# Of the selected tokens, 80 % become [MASK], 10 % a random token, 10 % stay.
MASKED, RANDOM = 0.8, 0.1


class MaskTokens(grain.transforms.RandomMap):
    """Maps tokens_T to `input_ids` and `labels`, both int32 [T].

    Each token that is not special is selected with probability `mask_rate`, on its own, as in
    the published recipe; a short block may thus have no selected token at all. A random token is
    drawn from the whole vocabulary. With `max_predictions` > 0 a random choice of that many
    selected tokens stays, for models that predict a fixed number of positions.
    """

    def __init__(self, tokenizer: Tokenizer, mask_rate: float = 0.15, max_predictions: int = 0):
        if not 0 < mask_rate <= 1:
            raise UserError(
                f"expected data.mask_rate in (0, 1], found {mask_rate}; the published rate is 0.15"
            )
        self._mask_rate, self._max_predictions = mask_rate, max_predictions
        self._mask_id = tokenizer.mask_id
        self._selectable_V = np.ones(tokenizer.vocab_size, dtype=bool)
        self._selectable_V[list(tokenizer.special_ids)] = False

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the masked input and the labels, IGNORE_LABEL where nothing is predicted."""
        tokens_T = np.asarray(element, dtype=np.int32)
        draw_T = rng.random(tokens_T.shape)
        selected_T = (draw_T < self._mask_rate) & self._selectable_V[tokens_T]
        if self._max_predictions and selected_T.sum() > self._max_predictions:
            highest = np.sort(draw_T[selected_T])[self._max_predictions - 1]
            selected_T &= draw_T <= highest
        fate_T = rng.random(tokens_T.shape)
        random_T = rng.integers(len(self._selectable_V), size=tokens_T.shape, dtype=np.int32)
        replaced_T = np.where(fate_T < MASKED + RANDOM, random_T, tokens_T)
        replaced_T[fate_T < MASKED] = self._mask_id
        return {
            "input_ids": np.where(selected_T, replaced_T, tokens_T),
            "labels": np.where(selected_T, tokens_T, np.int32(IGNORE_LABEL)),
        }
