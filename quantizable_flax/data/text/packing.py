"""Documents to blocks of `seq_len` tokens, built once and kept on disk."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from quantizable_flax.data.cache import cache_dir, cache_key, one_at_a_time, write_atomically
from quantizable_flax.data.text.documents import describe_documents, iter_documents
from quantizable_flax.data.text.pieces import pieces
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

FORMAT_VERSION = 1
_HEADER_BYTES = 512
BATCH_CHARS = 1 << 20
_READ_BYTES = 1 << 24
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Header:
    """What stands at the head of a cache file, as JSON padded to _HEADER_BYTES."""

    dtype: str
    seq_len: int
    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    crc32: int = 0
    stamp: int = 0  # when the file was written, in nanoseconds: whoever changes it changes its time
    version: int = FORMAT_VERSION

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks, self.seq_len

    @property
    def payload_bytes(self) -> int:
        return self.blocks * self.seq_len * np.dtype(self.dtype).itemsize


def packed_tokens(
    data_cfg: ConfigDict, tokenizer: Tokenizer, split: str, *, batch_chars: int = BATCH_CHARS
) -> np.ndarray:
    """Returns tokens_NxT of `split`: uint16 where the vocabulary fits, else int32; read-only.

    Every document is wrapped, as [CLS] ids [SEP] for BERT and </s> ids for OPT; the stream of all
    documents is cut every data.seq_len tokens, and only the last remainder is dropped. The array
    is mapped from a file in the cache folder, which one process builds while others wait, and
    whose checksum is verified where it may have changed; where the folder cannot be written, it is
    built in memory. `batch_chars` of text are in memory at a time, and decide nothing else. Raises
    UserError where the text does not fill one block.
    """
    seq_len = data_cfg.seq_len
    if not isinstance(seq_len, int) or seq_len < 2:
        raise UserError(
            f"expected data.seq_len to be an integer of at least 2, found {seq_len!r}; "
            "use for example 128"
        )
    path = cache_dir(data_cfg) / f"{split}-{_key(data_cfg, tokenizer, split)}.tokens"
    cached = _load(path)
    if cached is not None:
        return cached
    with one_at_a_time(path):
        cached = _load(path)  # another process may have built it
        if cached is not None:
            return cached
        return _built(path, lambda to: _build(to, data_cfg, tokenizer, split, batch_chars))


def _built(path: Path, build: Callable[[BinaryIO], _Header]) -> np.ndarray:
    def write(stream: BinaryIO) -> None:
        header = build(stream)
        stream.flush()
        with contextlib.suppress(OSError):  # then it is verified at every start
            os.utime(stream.fileno(), ns=(header.stamp, header.stamp))

    try:
        write_atomically(path, write)
    except OSError as error:
        _log.warning(
            "packed tokens are kept in memory only: %s cannot be written (%s); set data.cache_dir",
            path.parent,
            error,
        )
        stream = io.BytesIO()
        header = build(stream)
        payload = stream.getbuffer().toreadonly()[_HEADER_BYTES:]
        return np.frombuffer(payload, header.dtype).reshape(header.shape)
    built = _load(path, verify=True)
    if built is None:
        raise UserError(
            f"expected to read back {path}, found it gone or damaged; "
            "set data.cache_dir to a folder on a sound disk"
        )
    return built


def checksum(tokens_NxT: np.ndarray) -> int:
    """Returns the CRC-32 of the tokens of `packed_tokens`; of a mapped file, as its head has it."""
    if not isinstance(tokens_NxT, np.memmap):
        return zlib.crc32(tokens_NxT.data)
    with open(str(tokens_NxT.filename), "rb") as stream:
        return _Header(**json.loads(stream.read(_HEADER_BYTES))).crc32


def _key(data_cfg: ConfigDict, tokenizer: Tokenizer, split: str) -> str:
    return cache_key(
        {
            "documents": describe_documents(data_cfg, split),
            "split": split,
            "seq_len": data_cfg.seq_len,
            "tokenizer": tokenizer.to_json(),
            "version": FORMAT_VERSION,
        }
    )


def _load(path: Path, *, verify: bool = False) -> np.ndarray | None:
    """Returns the blocks of a whole cache file, None where it is absent or damaged.

    All of it is read to `verify` it, and whenever its time is not the one that its head tells.
    """
    try:
        with path.open("rb") as stream:
            header = _Header(**json.loads(stream.read(_HEADER_BYTES)))
            status = os.fstat(stream.fileno())
            if status.st_size != _HEADER_BYTES + header.payload_bytes:
                raise ValueError("its size differs")
            if verify or status.st_mtime_ns != header.stamp:
                crc32 = 0
                while chunk := stream.read(_READ_BYTES):
                    crc32 = zlib.crc32(chunk, crc32)
                if crc32 != header.crc32:
                    raise ValueError("its checksum differs")
        return np.memmap(path, header.dtype, mode="r", offset=_HEADER_BYTES, shape=header.shape)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("the cache file %s is damaged (%s) and is built again", path, error)
        return None


def _build(
    stream: BinaryIO, data_cfg: ConfigDict, tokenizer: Tokenizer, split: str, batch_chars: int
) -> _Header:
    """Writes header and blocks to `stream` in one pass over the documents."""
    start = time.monotonic()
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4"
    header = _Header(dtype, data_cfg.seq_len)
    stream.write(b" " * _HEADER_BYTES)
    rest = np.zeros(0, dtype)
    documents = iter_documents(data_cfg, split)
    with tqdm(desc=f"tokenizing {split}", unit=" documents", disable=None) as bar:
        for batch in _batches(documents, batch_chars):
            tokens_S = np.concatenate([rest, *_tokens(batch, tokenizer, dtype)])
            whole = len(tokens_S) // header.seq_len * header.seq_len
            payload = tokens_S[:whole].tobytes()
            count = sum(part.last for part in batch)
            header.crc32 = zlib.crc32(payload, header.crc32)
            header.blocks += whole // header.seq_len
            header.tokens += len(tokens_S) - len(rest)
            header.documents += count
            stream.write(payload)
            rest = tokens_S[whole:]
            bar.update(count)
    if not header.blocks:
        raise UserError(
            f"expected at least data.seq_len={header.seq_len} tokens in the {split} split, found "
            f"{header.tokens} in {header.documents} documents; add text or lower data.seq_len"
        )
    header.stamp = int(time.time()) // 2 * 2 * 10**9  # as whole as any file system keeps it
    stream.seek(0)
    stream.write(json.dumps(dataclasses.asdict(header)).ljust(_HEADER_BYTES).encode("ascii"))
    _log.info(
        "packed %s: %d documents, %d tokens, %d blocks of %d, %d tokens left over, %.1f s",
        split,
        header.documents,
        header.tokens,
        header.blocks,
        header.seq_len,
        len(rest),
        time.monotonic() - start,
    )
    return header


class _Part(NamedTuple):
    """A document, or one of the pieces of a long one."""

    text: str
    first: bool
    last: bool


def _batches(documents: Iterable[str], batch_chars: int) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    length = 0
    for document in documents:
        end = 0
        for text in pieces(document):
            start, end = end, end + len(text)
            batch.append(_Part(text, first=start == 0, last=end == len(document)))
            length += len(text)
            if length >= batch_chars:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch


def _tokens(batch: list[_Part], tokenizer: Tokenizer, dtype: str) -> Iterator[np.ndarray]:
    """Yields the tokens of each part, wrapped where its document begins and ends."""
    for part, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
        before = tokenizer.prefix_ids if part.first else ()
        after = tokenizer.suffix_ids if part.last else ()
        yield np.array((*before, *ids, *after), dtype)
