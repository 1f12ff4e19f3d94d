"""The masked-language-model task of BERT on packed blocks."""

import math

import numpy as np

from quantizable_flax.data.draws import Draws
from quantizable_flax.data.task import Batch, BatchTransform
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

# The label of a position that is not predicted.
IGNORE_LABEL = -100
# Of the selected tokens, 80 % become [MASK], 10 % a random token, 10 % stay.
MASKED, RANDOM = 0.8, 0.1
_SPARE = np.uint64(11)  # a double in [0, 1) takes the upper 53 bits of a word


class MaskTokens(BatchTransform):
    """Maps tokens_BxT to `input_ids` and `labels`, both int32 [B, T].

    Each token that is not special is selected with probability `mask_rate`, on its own, as in
    the published recipe; a short block may thus have no selected token at all. A random token is
    drawn from the whole vocabulary. With `max_predictions` > 0 a random choice of that many
    selected tokens stays, for models that predict a fixed number of positions.

    Of the words of a block, the first T select, the next T decide the fates, and the halves of
    those that follow are the random tokens.
    """

    def __init__(self, tokenizer: Tokenizer, mask_rate: float = 0.15, max_predictions: int = 0):
        if not 0 < mask_rate <= 1:
            raise UserError(
                f"expected data.mask_rate in (0, 1], found {mask_rate}; the published rate is 0.15"
            )
        self._limit = np.uint64(math.ceil(mask_rate * 2**53))
        self._max_predictions = max_predictions
        self._mask_id = tokenizer.mask_id
        self._selectable_V = np.ones(tokenizer.vocab_size, dtype=bool)
        self._selectable_V[list(tokenizer.special_ids)] = False

    def batch(self, elements: np.ndarray, draws: Draws) -> Batch:
        """Returns the masked inputs and the labels, IGNORE_LABEL where nothing is predicted."""
        labels_BxT = np.asarray(elements, dtype=np.int32)
        T = labels_BxT.shape[1]
        words_BxC = draws.words(2 * T + (T + 1) // 2)
        selected_BxT = self._selected(labels_BxT, words_BxC[:, :T] >> _SPARE)
        row_S, column_S = np.nonzero(selected_BxT)
        old_S = labels_BxT[row_S, column_S]
        fate_S = (words_BxC[row_S, T + column_S] >> _SPARE) * 2.0**-53
        draw_S = self._accepted(words_BxC, draws, T)[row_S, column_S].astype(np.uint64)
        random_S = (draw_S * np.uint64(len(self._selectable_V))) >> np.uint64(32)
        new_S = np.where(fate_S < MASKED + RANDOM, random_S.astype(np.int32), old_S)
        new_S[fate_S < MASKED] = self._mask_id
        input_BxT = labels_BxT.copy()
        input_BxT[row_S, column_S] = new_S
        return {
            "input_ids": input_BxT,
            "labels": np.where(selected_BxT, labels_BxT, np.int32(IGNORE_LABEL)),
        }

    def _selected(self, tokens_BxT: np.ndarray, draw_BxT: np.ndarray) -> np.ndarray:
        selected_BxT = (draw_BxT < self._limit) & self._selectable_V[tokens_BxT]
        if self._max_predictions:
            (over,) = np.nonzero(selected_BxT.sum(1) > self._max_predictions)
            draw_OxT = draw_BxT[over]
            last = self._max_predictions - 1
            ranked_OxT = np.where(selected_BxT[over], draw_OxT, self._limit)
            ranked_OxT.partition(last, axis=1)
            selected_BxT[over] &= draw_OxT <= ranked_OxT[:, last, None]
        return selected_BxT

    def _accepted(self, words_BxC: np.ndarray, draws: Draws, T: int) -> np.ndarray:
        """Returns draw_BxT, uint32, whose products with V have uniform tokens in the upper half.

        This is Lemire's method, by which NumPy draws bounded integers: where the lower bits are
        among those that would make some tokens more likely than others, the next draw follows.
        """
        V = np.uint32(len(self._selectable_V))
        biased = np.uint32(2**32 % int(V))
        draw_BxT = _halves(words_BxC[:, 2 * T :])[:, :T]
        (rows,) = np.nonzero((draw_BxT * V < biased).any(1))
        if len(rows):
            draw_BxT = draw_BxT.copy()
        for row in rows.tolist():
            bits = draws.generator(row).bit_generator
            bits.random_raw(2 * T, output=False)
            kept = np.zeros(0, np.uint32)
            while len(kept) < T:
                drawn = _halves(bits.random_raw(T))
                kept = np.concatenate([kept, drawn[drawn * V >= biased]])
            draw_BxT[row] = kept[:T]
        return draw_BxT


def _halves(words: np.ndarray) -> np.ndarray:
    """Returns the lower and the upper 32 bits of each word in turn, [..., 2C] of [..., C]."""
    return words.astype("<u8", copy=False).view("<u4")
