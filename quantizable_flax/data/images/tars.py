"""A plain tar, indexed once and read in place, with the links that extracting it would make."""

import functools
import os
import posixpath
import tarfile
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

from quantizable_flax.data.images.entries import (
    Entry,
    bad_link,
    is_hidden,
    not_a_file,
    parents,
    unreadable,
)
from quantizable_flax.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK
_NOTES = (b"V", b"D")  # GNU's labels of volumes and listings of folders carry no file
_MOST_LINKS = 40  # on the way to one file, as in Linux
_REPACK = "pack the archive again without it, or with what it leads to (tar --dereference)"
_OPENING = threading.Lock()


class Tar:
    """The members of a plain tar; reading shares one descriptor a process, also among threads."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor: int | None = None

    def __reduce__(self):
        return Tar, (self.path,)

    def entries(self) -> Iterator[Entry]:
        """Yields every file and folder that is not hidden, with the place of its bytes.

        Reads the headers alone. Of members of one name the last counts, as in extraction.
        """
        tree = _Tree(self)
        try:
            with tarfile.open(self.path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # Else all stay in memory.
                    tree.add(member)
                end = archive.offset
        except tarfile.TarError as error:
            raise _corrupt(self.path, str(error)) from None
        except OSError as error:
            raise unreadable(self.path, error) from None
        self._check_end(end)
        tree.close()
        yield from tree.entries()

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a member."""
        content = self._pread(entry.size, entry.offset)
        if len(content) != entry.size:
            raise _corrupt(self.path, f"{entry.name} is cut off")
        return content

    def describe(self, name: str) -> str:
        """Returns the path of the tar and of the member."""
        return f"{self.path}!{name}"

    def _check_end(self, end: int) -> None:
        """Raises UserError unless the archive ends where the standard library stopped reading."""
        # It takes a broken header in the middle for the end.
        if self._pread(_BLOCK, end).strip(b"\0"):
            raise _corrupt(self.path, f"no valid header at byte {end}")
        while chunk := self._pread(_CHUNK, end):
            if chunk.strip(b"\0"):
                zeros = len(chunk) - len(chunk.lstrip(b"\0"))
                start = zeros // _BLOCK * _BLOCK
                if _is_header(chunk[start : start + _BLOCK]):
                    raise UserError(
                        f"expected one tar in {self.path}, found another behind its end at byte "
                        f"{end + start}; join them with tar --concatenate, or name each"
                    )
                return  # what else stands there is no image
            end += len(chunk)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._open(), size, offset)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _open(self) -> int:
        if self._descriptor is None:
            with _OPENING:
                if self._descriptor is None:
                    descriptor = os.open(self.path, os.O_RDONLY)
                    weakref.finalize(self, os.close, descriptor)
                    self._descriptor = descriptor
        return self._descriptor


class _Link(NamedTuple):
    """A member that stands for another.

    Attributes:
      target: a path, of a hard link from the top of the archive, else from the link's folder.
    """

    target: str
    is_hard: bool


class _Tree:
    """The files that extracting an archive would leave, by path."""

    def __init__(self, tar: Tar):
        self._tar = tar
        self._nodes: dict[str, Entry | _Link] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        """Takes the next member; one of the same name before it is gone."""
        name = _inside(member.name)
        if not name or member.type in _NOTES:
            return
        if member.isdir():
            self._nodes[name] = Entry(name + "/")
        elif member.issym():
            self._nodes[name] = _Link(member.linkname, is_hard=False)
        elif member.islnk():
            target = _inside(member.linkname)
            # To what bears the name by now: it may be written over later.
            self._nodes[name] = self._copied(name, target)
        elif member.isreg() and not member.issparse():
            self._nodes[name] = Entry(name, member.offset_data, member.size)
        elif not is_hidden(name):
            sparse = member.issparse()
            found = "one stored with holes" if sparse else "a pipe, device or other oddity"
            advice = f"pack the archive again without {'--sparse' if sparse else 'it'}"
            raise not_a_file(self._tar.describe(name), found, advice)

    def close(self) -> None:
        """Adds the folders that are not members, once all members are there."""
        seen: set[str] = set()
        for name in list(self._nodes):
            for folder in parents(name):
                if folder in seen:
                    break
                seen.add(folder)
                node = self._nodes.setdefault(folder, Entry(folder + "/"))
                if isinstance(node, _Link) or not node.is_folder:
                    kind = "a link" if isinstance(node, _Link) else "a file"
                    raise _corrupt(self._tar.path, f"{folder} is {kind} and has {name} in it")

    def entries(self) -> Iterator[Entry]:
        """Yields files and folders; those behind links by the name that the link gives them."""
        for name, node in self._nodes.items():
            if is_hidden(name):
                continue
            if isinstance(node, _Link):
                yield from self._behind(name, self._followed(name), ("", *parents(name)))
            else:
                yield node

    def _copied(self, name: str, target: str) -> Entry | _Link:
        node = self._nodes.get(target)
        if isinstance(node, Entry) and not node.is_folder:
            return node._replace(name=name)
        return node if isinstance(node, _Link) else _Link(target, is_hard=True)

    def _behind(self, name: str, real: str, above: tuple[str, ...]) -> Iterator[Entry]:
        """Yields what stands at the path `real` as if it stood at `name`."""
        node = self._nodes[real] if real else Entry("/")
        assert isinstance(node, Entry)
        if not node.is_folder:
            yield node._replace(name=name)
            return
        if real in above:
            raise self._bad_link(name, f"back to {real or 'the whole archive'}, which holds it")
        yield Entry(name + "/")
        for child in self._children.get(real, ()):
            part = child.rpartition("/")[2]
            if not is_hidden(part):
                yield from self._behind(f"{name}/{part}", self._followed(child), (*above, real))

    @functools.cached_property
    def _children(self) -> dict[str, list[str]]:
        """The paths in each folder, for the few archives with links to folders."""
        children: dict[str, list[str]] = {}
        for name in self._nodes:
            children.setdefault(name.rpartition("/")[0], []).append(name)
        return children

    def _followed(self, name: str) -> str:
        """Returns the path of the file or folder that a path leads to, links followed."""
        ahead, behind, links = name.split("/")[::-1], list[str](), 0
        while ahead:
            part = ahead.pop()
            if part == ".." and not behind:
                raise self._bad_link(name, "out of the archive")
            if part == "..":
                behind.pop()
            if part in ("", ".", ".."):
                continue
            behind.append(part)
            node = self._nodes.get("/".join(behind))
            if isinstance(node, _Link):
                links += 1
                if links > _MOST_LINKS:
                    raise self._bad_link(name, "in a circle")
                if node.target.startswith("/"):
                    raise self._bad_link(name, f"to {node.target}, out of the archive")
                behind = [] if node.is_hard else behind[:-1]
                ahead += node.target.split("/")[::-1]
            elif node is None or (ahead and not node.is_folder):
                raise self._bad_link(name, f"to {'/'.join(behind)}, which is not in the archive")
        return "/".join(behind)

    def _bad_link(self, name: str, leads: str) -> UserError:
        return bad_link(self._tar.describe(name), leads, _REPACK)


def _inside(name: str) -> str:
    """Returns the path of a member below the folder that it is extracted to, "" for that folder."""
    parts = posixpath.normpath(name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _corrupt(path: str, reason: str) -> UserError:
    return UserError(
        f"expected a whole tar in {path}, found it truncated or corrupt ({reason}); "
        "fetch or pack it again"
    )
