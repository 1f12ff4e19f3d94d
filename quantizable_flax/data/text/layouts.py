"""How the tokens of documents become rows: packed blocks, or rows of one document each."""

import abc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.data.text.classes import Classes
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

# What is left of a document whose other rows are full; fewer tokens say nothing of a text.
MIN_REST = 8


class Part(NamedTuple):
    """A document, or one of the pieces of a long one.

    Attributes:
      text: of the piece.
      first, last: whether its document begins and ends with it.
      label: the number of the document's class, 0 where it has none.
    """

    text: str
    first: bool
    last: bool
    label: int


_AT_ONCE = 1 << 12  # rows: many short documents fit into few characters
Content = tuple[list[int], int]  # what a row holds between its ends, and the class
Encoded = tuple[Part, list[int]]  # with its ids, nothing around them


class Layout(abc.ABC):
    """What rows look like.

    Attributes:
      unit: what a row is called.
      least: what a split must have, for messages.
      width: numbers of a row.
      dtype: of the smallest type that holds them.
      classes: of the documents, None where they have none.
    """

    unit = "rows"
    least = "one token"
    width: int
    dtype: str
    classes: Classes | None = None

    def __init__(self, seq_len: int, tokenizer: Tokenizer, least_len: int):
        if not isinstance(seq_len, int) or seq_len < least_len:
            raise UserError(
                f"expected data.seq_len to be an integer of at least {least_len}, found "
                f"{seq_len!r}; use for example 128"
            )
        self._seq_len = seq_len
        self._before, self._after = tuple(tokenizer.prefix_ids), tuple(tokenizer.suffix_ids)

    @property
    def key(self) -> dict[str, Any]:
        """What was packed before there were others has a key without a word of it."""
        return {}

    @abc.abstractmethod
    def rows(self, batches: Iterable[list[Encoded]]) -> Iterator[np.ndarray]:
        """Yields rows [N, width] of documents that come a batch of parts after another."""


class Packed(Layout):
    """Wrapped documents one after another, cut every seq_len tokens; the remainder is dropped."""

    unit = "blocks"

    def __init__(self, seq_len: int, tokenizer: Tokenizer):
        super().__init__(seq_len, tokenizer, least_len=2)
        self.width, self.least = seq_len, f"data.seq_len={seq_len} tokens"
        self.dtype = _dtype(tokenizer.vocab_size)

    def rows(self, batches: Iterable[list[Encoded]]) -> Iterator[np.ndarray]:
        """Yields tokens_NxT."""
        rest = np.zeros(0, self.dtype)
        for batch in batches:
            tokens_S = np.concatenate([rest, *(self._wrapped(*encoded) for encoded in batch)])
            whole = len(tokens_S) // self.width * self.width
            yield tokens_S[:whole].reshape(-1, self.width)
            rest = tokens_S[whole:]

    def _wrapped(self, part: Part, ids: list[int]) -> np.ndarray:
        """Returns the tokens of a part, wrapped where its document begins and ends."""
        before = self._before if part.first else ()
        after = self._after if part.last else ()
        return np.array((*before, *ids, *after), self.dtype)


class DocumentRows(Layout):
    """Rows of one document each, every one wrapped and padded to seq_len tokens.

    A document that is longer than a row goes on in the next, and what is left of it is dropped
    where that is less than MIN_REST tokens; of documents with classes, the first row is all.

    Behind its tokens a row has their number, and the number of its class where there are classes.
    """

    def __init__(self, seq_len: int, tokenizer: Tokenizer, classes: Classes | None = None):
        ends = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
        super().__init__(seq_len, tokenizer, least_len=ends + 1)
        self.classes, self._content = classes, seq_len - ends
        self._pad_id = tokenizer.pad_id
        self.width = seq_len + (1 if classes is None else 2)
        labels = 0 if classes is None else classes.count
        self.dtype = _dtype(max(tokenizer.vocab_size, seq_len + 1, labels))

    @property
    def key(self) -> dict[str, Any]:
        """The kind of rows, and what decides the numbers of their classes."""
        if self.classes is None:
            return {"layout": "rows", "rest": MIN_REST}
        return {"layout": "labelled", **self.classes.description}

    def rows(self, batches: Iterable[list[Encoded]]) -> Iterator[np.ndarray]:
        """Yields rows_NxW: tokens, their number and the class."""
        split = self._whole if self.classes is None else self._beginnings
        for contents in split(batches):
            for start in range(0, len(contents), _AT_ONCE):
                yield self._padded(contents[start : start + _AT_ONCE])

    def _whole(self, batches: Iterable[list[Encoded]]) -> Iterator[list[Content]]:
        """Yields what the rows of whole documents hold, a batch at a time."""
        length, full = self._content, False
        rest: list[int] = []
        for batch in batches:
            contents = []
            for part, ids in batch:
                rest, full = (ids, False) if part.first else (rest + ids, full)
                end = len(rest) // length * length
                contents += [(rest[start : start + length], 0) for start in range(0, end, length)]
                full, rest = full or end > 0, rest[end:]
                if part.last and (len(rest) >= MIN_REST or not full):
                    contents.append((rest, 0))
            yield contents

    def _beginnings(self, batches: Iterable[list[Encoded]]) -> Iterator[list[Content]]:
        """Yields what the first row of each document holds, with its class."""
        begun: list[int] = []
        for batch in batches:
            contents = []
            for part, ids in batch:
                begun = ([] if part.first else begun) + ids
                del begun[self._content :]
                if part.last:
                    contents.append((begun, part.label))
            yield contents

    def _padded(self, contents: list[Content]) -> np.ndarray:
        T = self._seq_len
        rows_NxW = np.full((len(contents), self.width), self._pad_id, self.dtype)
        for row_W, (ids, label) in zip(rows_NxW, contents, strict=True):
            tokens = (*self._before, *ids, *self._after)
            row_W[: len(tokens)] = tokens
            row_W[T], row_W[T + 1 :] = len(tokens), label
        return rows_NxW


def _dtype(count: int) -> str:
    """Returns the type of numbers below `count`: two bytes where they suffice."""
    return "<u2" if count <= 1 << 16 else "<i4"
