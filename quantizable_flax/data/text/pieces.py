"""Long texts in pieces that a tokenizer treats as it treats the whole."""

from collections.abc import Iterator

# Some hundred thousand tokens: what a tokenizer holds of them is a hundred times the text.
PIECE_CHARS = 1 << 18


def pieces(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yields a text in pieces of at most `piece_chars` characters, one after another."""
    start = 0
    while len(text) - start > piece_chars:
        end = start + word_end(text[start : start + piece_chars])
        yield text[start:end]
        start = end
    yield text[start:]


def word_end(text: str) -> int:
    """Returns where the last word of a text ends behind which there is white space.

    The space belongs to what follows, as in byte-level BPE: both WordPiece and that split every
    text there, so that its two sides have the tokens that they have together. Where no word ends
    in the second half, that is the whole length.
    """
    half = len(text) // 2
    space = max(text.rfind(" ", half), text.rfind("\n", half))
    end = len(text[:space].rstrip()) if space > 0 else 0
    return end if end > half else len(text)
