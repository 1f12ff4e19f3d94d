"""Documents to rows of `seq_len` tokens, built once and kept on disk."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from quantizable_flax.data.cache import cache_dir, cache_key
from quantizable_flax.data.text.classes import Classes
from quantizable_flax.data.text.documents import describe_documents, iter_documents, iter_labelled
from quantizable_flax.data.text.kept import FORMAT_VERSION, HEADER_BYTES, Header, kept_rows
from quantizable_flax.data.text.layouts import DocumentRows, Encoded, Layout, Packed, Part
from quantizable_flax.data.text.pieces import pieces
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

BATCH_CHARS = 1 << 20
_log = logging.getLogger(__name__)


def packed_tokens(
    data_cfg: ConfigDict, tokenizer: Tokenizer, split: str, *, batch_chars: int = BATCH_CHARS
) -> np.ndarray:
    """Returns tokens_NxT of `split`: uint16 where the vocabulary fits, else int32; read-only.

    Every document is wrapped, as [CLS] ids [SEP] for BERT and </s> ids for OPT; the stream of all
    documents is cut every data.seq_len tokens, and only the last remainder is dropped. The array
    is mapped from a file in the cache folder, see `kept.kept_rows`. `batch_chars` of text are in
    memory at a time, and decide nothing else. Raises UserError where the text does not fill one
    block.
    """
    layout = Packed(data_cfg.seq_len, tokenizer)
    return _laid_out(data_cfg, tokenizer, split, layout, batch_chars)


def document_rows(
    data_cfg: ConfigDict,
    tokenizer: Tokenizer,
    split: str,
    *,
    classes: Classes | None = None,
    batch_chars: int = BATCH_CHARS,
) -> np.ndarray:
    """Returns rows_NxW of `split`, of one document each; kept as `packed_tokens`.

    A row is data.seq_len tokens, padding included, how many of them are none, and the class where
    there are `classes`: W is data.seq_len + 1, or + 2; see `layouts.DocumentRows`. Raises
    UserError for a document whose class is not one of `classes`, and for a split without text.
    """
    layout = DocumentRows(data_cfg.seq_len, tokenizer, classes)
    return _laid_out(data_cfg, tokenizer, split, layout, batch_chars)


def _laid_out(
    data_cfg: ConfigDict, tokenizer: Tokenizer, split: str, layout: Layout, batch_chars: int
) -> np.ndarray:
    labelled = layout.classes is not None
    key = cache_key(
        {
            "documents": describe_documents(data_cfg, split, labelled=labelled),
            "split": split,
            "seq_len": data_cfg.seq_len,
            "tokenizer": tokenizer.to_json(),
            "version": FORMAT_VERSION,
            **layout.key,
        }
    )

    def build(stream: BinaryIO) -> Header:
        batches = _batches(_texts(data_cfg, split, layout.classes), batch_chars)
        return _build(stream, batches, tokenizer, layout, split)

    return kept_rows(cache_dir(data_cfg) / f"{split}-{key}.tokens", build)


def _texts(data_cfg: ConfigDict, split: str, classes: Classes | None) -> Iterator[tuple[str, int]]:
    if classes is None:
        return ((text, 0) for text in iter_documents(data_cfg, split))
    documents = iter_labelled(data_cfg, split)
    return ((document.text, classes.number(document)) for document in documents)


def _build(
    stream: BinaryIO,
    batches: Iterable[list[Part]],
    tokenizer: Tokenizer,
    layout: Layout,
    split: str,
) -> Header:
    """Writes header and rows to `stream` in one pass over the documents."""
    start = time.monotonic()
    header = Header(layout.dtype, layout.width)
    stream.write(b" " * HEADER_BYTES)
    with tqdm(desc=f"tokenizing {split}", unit=" documents", disable=None) as bar:
        for rows_NxW in layout.rows(_encoded(batches, tokenizer, header, bar)):
            payload = rows_NxW.tobytes()
            header.add(payload)
            stream.write(payload)
    if not header.blocks:
        raise UserError(
            f"expected at least {layout.least} in the {split} split, found "
            f"{header.tokens} in {header.documents} documents; add text or lower data.seq_len"
        )
    header.write(stream)
    _log.info(
        "laid out %s: %d documents, %d tokens, %d %s of %d, %.1f s",
        split,
        header.documents,
        header.tokens,
        header.blocks,
        layout.unit,
        header.seq_len,
        time.monotonic() - start,
    )
    return header


def _encoded(
    batches: Iterable[list[Part]], tokenizer: Tokenizer, header: Header, bar: tqdm
) -> Iterator[list[Encoded]]:
    """Yields the parts with their ids, and counts documents and tokens, each document wrapped."""
    before, after = len(tokenizer.prefix_ids), len(tokenizer.suffix_ids)
    for batch in batches:
        encoded = tokenizer.encode_batch([part.text for part in batch])
        yield list(zip(batch, encoded, strict=True))
        count = sum(part.last for part in batch)
        header.tokens += sum(map(len, encoded))
        header.tokens += before * sum(part.first for part in batch) + after * count
        header.documents += count
        bar.update(count)


def _batches(documents: Iterable[tuple[str, int]], batch_chars: int) -> Iterator[list[Part]]:
    batch: list[Part] = []
    length = 0
    for document, label in documents:
        end = 0
        for text in pieces(document):
            start, end = end, end + len(text)
            batch.append(Part(text, start == 0, end == len(document), label))
            length += len(text)
            if length >= batch_chars:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch
