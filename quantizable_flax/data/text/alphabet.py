"""The characters that a WordPiece vocabulary starts from."""

from collections.abc import Callable, Iterable

import numpy as np

_CODE_POINTS = 0x110000
_SPACE, _ALONE, _WORD = 1, 2, 3


def frequent_characters(
    texts: Iterable[str], split_words: Callable[[str], list[str]], limit: int
) -> tuple[list[str], list[str]]:
    """Returns the `limit` most frequent characters of normalised texts, by code point.

    The second list holds those of them that occur inside a word, after its first character.
    `split_words` is the pre-tokenizer: it says which characters are spaces, words of their own
    or parts of a word.
    """
    counts_C = np.zeros(_CODE_POINTS, dtype=np.int64)
    inside_C = np.zeros(_CODE_POINTS, dtype=bool)
    kinds_C = np.zeros(_CODE_POINTS, dtype=np.uint8)
    for text in texts:
        codes_S = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        unique_U, count_U = np.unique(codes_S, return_counts=True)
        for code in unique_U[kinds_C[unique_U] == 0]:
            kinds_C[code] = _kind(chr(code), split_words)
        counts_C[unique_U] += count_U
        word_S = kinds_C[codes_S] == _WORD
        inside_C[codes_S[1:][word_S[1:] & word_S[:-1]]] = True
    counts_C[kinds_C == _SPACE] = 0
    # Equal counts go by code point: the stable sort makes the choice reproducible.
    order_C = np.argsort(-counts_C, kind="stable")[:limit]
    chosen = sorted(int(code) for code in order_C if counts_C[code])
    return [chr(code) for code in chosen], [chr(code) for code in chosen if inside_C[code]]


def _kind(character: str, split_words: Callable[[str], list[str]]) -> int:
    if not split_words(character):
        return _SPACE
    return _WORD if split_words("a" + character) == ["a" + character] else _ALONE
