"""What a folder or tar of images holds, before anybody asks which of it are images."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from quantizable_flax.errors import UserError


class Entry(NamedTuple):
    """A file, or a folder whose name ends in "/", by its path inside the container."""

    name: str
    offset: int = 0
    size: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.name.endswith("/")


class Container(Protocol):
    """Files by name; pickles as its path."""

    path: str

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder that is not hidden, in any order.

        A link stands for what it leads to, with all that is in it.

        Raises:
          UserError: what cannot be read, or a link that leads nowhere, out or in a circle.
        """
        ...

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a file."""
        ...

    def describe(self, name: str) -> str:
        """Returns how messages call a file."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a path has a part that programs keep for themselves, as `.cache` or `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def parents(name: str) -> Iterator[str]:
    """Yields the folders above a path, the innermost first, without the container itself."""
    while name := name.rpartition("/")[0]:
        yield name


def unreadable(path: str, error: OSError) -> UserError:
    """Returns the message for what the system does not let us read."""
    return UserError(
        f"expected to be able to read {path}, found '{error.strerror or error}'; "
        "correct the path or its permissions"
    )


def bad_link(link: str, leads: str, advice: str) -> UserError:
    """Returns the message for a link that leads to no file and no folder of its own."""
    return UserError(
        f"expected the link {link} to lead to a file or folder, found that it leads {leads}; "
        f"{advice}"
    )


def not_a_file(path: str, found: str, advice: str) -> UserError:
    """Returns the message for what is neither file, folder nor link."""
    return UserError(f"expected a file or folder in {path}, found {found}; {advice}")
