"""Where image files lie: a folder, or a plain tar that is indexed once and read in place."""

import errno
import os
from collections.abc import Iterator

from quantizable_flax.data.images.entries import (
    Container,
    Entry,
    bad_link,
    is_hidden,
    not_a_file,
    unreadable,
)
from quantizable_flax.data.images.tars import Tar
from quantizable_flax.errors import UserError

_COMPRESSED = (".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".zst")


def open_container(path: str, option: str) -> Container:
    """Returns the folder or tar at `path`, which `option` of the configuration names.

    Raises:
      UserError: something else is there, or a compressed tar.
    """
    if os.path.isdir(path):
        return Folder(path)
    if path.lower().endswith(_COMPRESSED):
        raise UserError(
            f"expected a folder or a plain .tar in {option}, found the compressed {path}, which "
            "has no random access; unpack it, or decompress it to a .tar"
        )
    if not path.lower().endswith(".tar"):
        raise UserError(
            f"expected a folder of class folders or a .tar in {option}, found the file {path}; "
            "name the folder above the class folders"
        )
    return Tar(path)


class Folder:
    """The files below a folder; links may lead anywhere but to a folder above themselves."""

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder that is not hidden, at any depth."""
        pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(self.path),))]
        while pending:
            parent, above = pending.pop()
            try:
                with os.scandir(os.path.join(self.path, parent)) as children:
                    for child in children:
                        if is_hidden(child.name):
                            continue
                        name = parent + child.name
                        if self._is_folder(child, name):
                            pending.append((name + "/", self._within(child, name, above)))
                            yield Entry(name + "/")
                        else:
                            yield Entry(name)
            except OSError as error:
                raise unreadable(os.path.join(self.path, parent), error) from None

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a file."""
        path = self.describe(entry.name)
        try:
            with open(path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise unreadable(path, error) from None

    def describe(self, name: str) -> str:
        """Returns the path of a file."""
        return os.path.join(self.path, name)

    def _is_folder(self, child: os.DirEntry, name: str) -> bool:
        """Whether it is a folder, and not a file; raises UserError where it is neither."""
        path = self.describe(name)
        try:
            if child.is_dir():
                return True
            if child.is_file():
                return False
            # Else a pipe, a socket, a device or a link to nothing: to open it might never end.
            dangles = child.is_symlink() and not os.path.exists(path)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise unreadable(path, error) from None
            raise bad_link(path, "in a circle", "correct or remove the link") from None
        if dangles:
            leads = f"to {os.readlink(path)}, which is not there"
            raise bad_link(path, leads, "bring that back, or correct or remove the link")
        raise not_a_file(path, "a pipe, socket or device", "remove it")

    def _within(self, child: os.DirEntry, name: str, above: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the real paths of a folder and of those above; raises UserError for a circle."""
        path = self.describe(name)
        real = os.path.realpath(path) if child.is_symlink() else f"{above[-1]}/{child.name}"
        if real in above:
            leads = f"back to {real}, which holds it"
            raise bad_link(path, leads, "correct or remove the link")
        return (*above, real)
