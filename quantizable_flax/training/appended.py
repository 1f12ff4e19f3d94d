"""Files that grow by whole records, on a disk or in a bucket, and never stop a run."""

import collections
import contextlib
import os
import time
from collections.abc import Callable
from typing import BinaryIO, cast

from etils import epath

UPLOAD_SECONDS = 60  # between two writes of a whole file to a bucket
KEPT = 10_000  # records that wait for a storage which cannot be written


class Appended:
    """A file to append records to: at once on a disk, within a minute in a bucket.

    An object in a bucket cannot be appended to, so it is written whole. A record that cannot be
    written waits and is tried again with the next one, in order; on a disk nothing of it is left,
    so that a file holds whole records whenever it is read.
    """

    def __init__(
        self,
        path: epath.Path,
        prepare: Callable[[epath.Path], None] = lambda path: None,
        outcome: Callable[[epath.Path, Exception | None], None] = lambda path, error: None,
    ):
        """Opens nothing yet.

        Args:
          path: of the file; its folder is made.
          prepare: called with it before the first record is written, again if it fails.
          outcome: called with it after each attempt to write, and with what failed or None.
        """
        self._path, self._prepare, self._outcome = path, prepare, outcome
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=KEPT)
        self._local, self._prepared = "://" not in str(path), False
        self._file: BinaryIO | None = None
        self._size: int | None = None  # of the records written whole
        self._content, self._uploaded = b"", time.monotonic()

    def write(self, record: bytes) -> None:
        """Appends a record; never fails."""
        self._waiting.append(record)
        if self._local or time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._try()

    def close(self) -> int:
        """Writes what is left; returns how many records could not be written."""
        if self._waiting:
            self._try()
        self._release()
        return len(self._waiting)

    def _try(self) -> None:
        try:
            if not self._prepared:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._prepare(self._path)
                if not self._local:
                    self._content = self._path.read_bytes() if self._path.exists() else b""
                self._prepared = True
            if self._local:
                self._append()
            else:
                self._upload()
        except Exception as error:  # every storage library has its own
            self._release()
            self._outcome(self._path, error)
        else:
            self._outcome(self._path, None)

    def _append(self) -> None:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            if self._size is None:
                self._size = os.fstat(self._file.fileno()).st_size
            self._cut(self._file)
        while self._waiting:
            rest = memoryview(self._waiting[0])
            while rest:
                rest = rest[self._file.write(rest) :]
            self._size = cast(int, self._size) + len(self._waiting.popleft())

    def _cut(self, file: BinaryIO) -> None:
        """Takes off what was written of a record that did not fit."""
        if self._size is not None and os.fstat(file.fileno()).st_size > self._size:
            file.truncate(self._size)

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        content = self._content + b"".join(self._waiting)
        self._path.write_bytes(content)
        self._content = content
        self._waiting.clear()

    def _release(self) -> None:
        """Closes the file; the next attempt opens it anew, for the storage may be another by then.

        That one also takes off what cannot be taken off now.
        """
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self._cut(file)
            with contextlib.suppress(OSError):
                file.close()
