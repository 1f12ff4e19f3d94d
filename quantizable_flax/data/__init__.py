"""Text to batches: documents, tokenizer, packed blocks, masking, training and evaluation."""

from quantizable_flax.data.documents import iter_documents
from quantizable_flax.data.masking import MaskTokens
from quantizable_flax.data.objective import make_transform
from quantizable_flax.data.packing import packed_tokens
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "MaskTokens",
    "Tokenizer",
    "build_tokenizer",
    "eval_batches",
    "iter_documents",
    "make_transform",
    "packed_tokens",
    "train_iterator",
]
