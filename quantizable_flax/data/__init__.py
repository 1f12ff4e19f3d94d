"""Text and images to batches: sources, tokenizers, tasks, training and evaluation."""

from quantizable_flax.data.calibration import calibration_batches
from quantizable_flax.data.documents import iter_documents
from quantizable_flax.data.masking import MaskTokens
from quantizable_flax.data.packing import packed_tokens
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.share import WHOLE, Share
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.data.task import Task
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.tokenizer import Tokenizer
from quantizable_flax.data.tokenizer_build import build_tokenizer

__all__ = [
    "WHOLE",
    "MaskTokens",
    "Share",
    "Task",
    "Tokenizer",
    "batch_specs",
    "build_tokenizer",
    "calibration_batches",
    "eval_batches",
    "iter_documents",
    "make_task",
    "packed_tokens",
    "train_iterator",
]
