"""Where image files lie: a folder, or a plain tar that is indexed once and read in place."""

import os
import posixpath
import tarfile
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from quantizable_flax.errors import UserError

_COMPRESSED = (".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".zst")
_BLOCK = 512
_OPENING = threading.Lock()


class Entry(NamedTuple):
    """A file, or a folder whose name ends in "/", by its path inside the container."""

    name: str
    offset: int = 0
    size: int = 0


class Container(Protocol):
    """Files by name; pickles as its path."""

    path: str

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder, in any order."""
        ...

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a file."""
        ...

    def describe(self, name: str) -> str:
        """Returns how messages call a file."""
        ...


def open_container(path: str, option: str) -> Container:
    """Returns the folder or tar at `path`, which `option` of the configuration names.

    Raises:
      UserError: something else is there, or a compressed tar.
    """
    if os.path.isdir(path):
        return Folder(path)
    if path.endswith(_COMPRESSED):
        raise UserError(
            f"expected a folder or a plain .tar in {option}, found the compressed {path}, which "
            "has no random access; unpack it, or decompress it to a .tar"
        )
    if not path.endswith(".tar"):
        raise UserError(
            f"expected a folder of class folders or a .tar in {option}, found the file {path}; "
            "name the folder above the class folders"
        )
    return Tar(path)


class Folder:
    """The files below a folder."""

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder, at any depth."""
        pending = [""]
        while pending:
            parent = pending.pop()
            try:
                with os.scandir(os.path.join(self.path, parent)) as children:
                    for child in children:
                        name = parent + child.name
                        if child.is_dir():
                            pending.append(name + "/")
                            yield Entry(name + "/")
                        else:
                            yield Entry(name)
            except OSError as error:
                raise _unreadable(os.path.join(self.path, parent), error) from None

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a file."""
        path = self.describe(entry.name)
        try:
            with open(path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise _unreadable(path, error) from None

    def describe(self, name: str) -> str:
        """Returns the path of a file."""
        return os.path.join(self.path, name)


class Tar:
    """The members of a plain tar; reading shares one descriptor a process, also among threads."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor: int | None = None

    def __reduce__(self):
        return Tar, (self.path,)

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder, with the place of its bytes; reads the headers alone."""
        try:
            with tarfile.open(self.path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # Else all stay in memory.
                    name = posixpath.normpath(member.name).lstrip("/")
                    if member.isdir():
                        yield Entry(name + "/")
                    elif member.isreg():
                        yield Entry(name, member.offset_data, member.size)
                end = archive.offset
        except tarfile.TarError as error:
            raise _corrupt(self.path, str(error)) from None
        except OSError as error:
            raise _unreadable(self.path, error) from None
        # The standard library takes a broken header in the middle for the end.
        if self._pread(_BLOCK, end).strip(b"\0"):
            raise _corrupt(self.path, f"no valid header at byte {end}")

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a member."""
        content = self._pread(entry.size, entry.offset)
        if len(content) != entry.size:
            raise _corrupt(self.path, f"{entry.name} is cut off")
        return content

    def describe(self, name: str) -> str:
        """Returns the path of the tar and of the member."""
        return f"{self.path}!{name}"

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._open(), size, offset)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _open(self) -> int:
        if self._descriptor is None:
            with _OPENING:
                if self._descriptor is None:
                    descriptor = os.open(self.path, os.O_RDONLY)
                    weakref.finalize(self, os.close, descriptor)
                    self._descriptor = descriptor
        return self._descriptor


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"expected to be able to read {path}, found '{error.strerror or error}'; "
        "correct the path or its permissions"
    )


def _corrupt(path: str, reason: str) -> UserError:
    return UserError(
        f"expected a whole tar in {path}, found it truncated or corrupt ({reason}); "
        "fetch or pack it again"
    )
