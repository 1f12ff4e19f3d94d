"""The file that says who has a workdir: on a file system, whose kernel locks it, or in a bucket."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from etils import epath

from quantizable_flax.checkpoint.owner import Owner

FILE = "lock.json"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class BucketFile:
    """`lock.json` in a bucket."""

    device: int | None = None

    def __init__(self, workdir: epath.Path):
        self.path = workdir / FILE

    def open(self) -> bool | None:
        """Returns whether the kernel's lock is held now, None if another process holds it."""
        return False

    def read(self) -> tuple[Owner | None, object]:
        """Returns the owner, if the file is there, and something that each heartbeat changes."""
        text = self.path.read_text() if self.path.exists() else ""
        return Owner.parse(text), text

    def write(self, owner: Owner, beat: int) -> None:
        """Writes the file, or renews it at a later beat than 0."""
        self.path.write_text(owner.to_json(beat))

    def close(self, remove: bool) -> None:
        """Gives the kernel's lock back, and removes the file if asked to."""
        if remove:
            self.path.unlink(missing_ok=True)


class LocalFile(BucketFile):
    """`lock.json` on a file system; its folder is made, and removed again if nothing is in it."""

    def __init__(self, workdir: epath.Path):
        super().__init__(workdir)
        self._file, self._made = -1, list[Path]()
        folder = Path(workdir)
        while not folder.exists():
            self._made.append(folder)
            folder = folder.parent

    def open(self) -> bool | None:
        """Makes folder and file if need be; the file is not inherited by other programs."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # a run that made the folder has just removed it
                continue
            self.device = os.fstat(self._file).st_dev
            locked = self._lock()
            if locked is False or (locked and self._is_there()):
                return locked
            os.close(self._file)
            if locked is None:
                return None  # else the run that had it has just removed it

    def _lock(self) -> bool | None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def read(self) -> tuple[Owner | None, object]:
        """As in a bucket; each heartbeat changes the time of the file."""
        # Opened anew: a network file system then asks its server for the time of the file.
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return Owner.parse(file.read()), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None, None

    def write(self, owner: Owner, beat: int) -> None:
        """As in a bucket, but a later beat writes nothing: it needs no room on a full disk."""
        if beat:
            os.utime(self.path)
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, owner.to_json(beat).encode(), 0)

    def close(self, remove: bool) -> None:
        """As in a bucket; removes the folders that were made, too, if nothing is in them."""
        if remove and self._is_there():
            os.unlink(self.path)
        os.close(self._file)
        with contextlib.suppress(OSError):  # something else is in it
            for folder in self._made if remove else []:
                folder.rmdir()
