"""Rows of numbers in the cache folder: built once, mapped from there, never trusted too much."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quantizable_flax.data.cache import one_at_a_time, write_atomically
from quantizable_flax.errors import UserError

FORMAT_VERSION = 1
HEADER_BYTES = 512
_READ_BYTES = 1 << 24
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Header:
    """What stands at the head of a cache file, as JSON padded to HEADER_BYTES.

    A block is a row of the file, seq_len its numbers: some more than data.seq_len where a row
    tells its length.
    """

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
        """Rows and numbers of a row."""
        return self.blocks, self.seq_len

    @property
    def payload_bytes(self) -> int:
        """What the file holds behind its head."""
        return self.blocks * self.seq_len * np.dtype(self.dtype).itemsize

    def add(self, payload: bytes) -> None:
        """Counts rows that were written, as part of the checksum."""
        self.crc32 = zlib.crc32(payload, self.crc32)
        self.blocks += len(payload) // (self.seq_len * np.dtype(self.dtype).itemsize)

    def write(self, stream: BinaryIO) -> None:
        """Writes the head of a file whose rows are complete."""
        self.stamp = int(time.time()) // 2 * 2 * 10**9  # as whole as any file system keeps it
        stream.seek(0)
        stream.write(json.dumps(dataclasses.asdict(self)).ljust(HEADER_BYTES).encode("ascii"))


def kept_rows(path: Path, build: Callable[[BinaryIO], Header]) -> np.ndarray:
    """Returns the rows of a cache file, mapped and read-only, [N, header.seq_len].

    One process builds it while others wait; its checksum is verified where it may have changed.
    Where the folder cannot be written, the rows are built in memory.

    Args:
      path: of the file, whose name changes with whatever decides the rows.
      build: writes a file, head and rows, and returns the head; it may be called twice.

    Raises:
      UserError: what `build` raises, or a disk that loses what is written.
    """
    kept = _load(path)
    if kept is not None:
        return kept
    with one_at_a_time(path):
        kept = _load(path)  # another process may have built it
        return _built(path, build) if kept is None else kept


def checksum(rows_NxC: np.ndarray) -> int:
    """Returns the CRC-32 of what `kept_rows` returned; of a mapped file, as its head has it."""
    if not isinstance(rows_NxC, np.memmap):
        return zlib.crc32(rows_NxC.data)
    with open(str(rows_NxC.filename), "rb") as stream:
        return Header(**json.loads(stream.read(HEADER_BYTES))).crc32


def _built(path: Path, build: Callable[[BinaryIO], Header]) -> np.ndarray:
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
        payload = stream.getbuffer().toreadonly()[HEADER_BYTES:]
        return np.frombuffer(payload, header.dtype).reshape(header.shape)
    built = _load(path, verify=True)
    if built is None:
        raise UserError(
            f"expected to read back {path}, found it gone or damaged; "
            "set data.cache_dir to a folder on a sound disk"
        )
    return built


def _load(path: Path, *, verify: bool = False) -> np.ndarray | None:
    """Returns the rows of a whole cache file, None where it is absent or damaged.

    All of it is read to `verify` it, and whenever its time is not the one that its head tells.
    """
    try:
        with path.open("rb") as stream:
            header = Header(**json.loads(stream.read(HEADER_BYTES)))
            status = os.fstat(stream.fileno())
            if status.st_size != HEADER_BYTES + header.payload_bytes:
                raise ValueError("its size differs")
            if verify or status.st_mtime_ns != header.stamp:
                crc32 = 0
                while chunk := stream.read(_READ_BYTES):
                    crc32 = zlib.crc32(chunk, crc32)
                if crc32 != header.crc32:
                    raise ValueError("its checksum differs")
        return np.memmap(path, header.dtype, mode="r", offset=HEADER_BYTES, shape=header.shape)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("the cache file %s is damaged (%s) and is built again", path, error)
        return None
