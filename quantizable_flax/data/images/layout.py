"""Which image belongs to which class and split: `class/image` or `split/class/image`.

Where no classes are asked for, an image may lie anywhere, in a split or not.
"""

import collections
import logging
import os
from typing import NamedTuple

from quantizable_flax.data.images.entries import Container, Entry
from quantizable_flax.data.images.pool import normalised
from quantizable_flax.data.splits import VALIDATION_SPLITS
from quantizable_flax.errors import UserError

_log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Named in a warning. A .gif is left out as an animation; what is a GIF by its content alone, as
# some pictures in collections from the web are, gives its first frame (decode.py).
_UNREAD = (
    *(".gif", ".apng", ".avif", ".avifs", ".heic", ".heif", ".jxl", ".jfif", ".jpe"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".dib", ".ico", ".tga", ".psd", ".svg"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".exr", ".hdr", ".npy", ".npz", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)
TRAIN_SPLITS = ("train",)
SPLITS = TRAIN_SPLITS + VALIDATION_SPLITS
_NO_SPLIT = ""
NO_CLASS = ""


class ImageFile(NamedTuple):
    """An image in a container."""

    container: int
    entry: Entry

    @property
    def key(self) -> str:
        """`class/file`, wherever it lies and whatever its system does to accents."""
        return normalised("/".join(self.entry.name.rsplit("/", 2)[-2:]))


class _Contents(NamedTuple):
    """The images, the folders, by folder a file that is none, and images of types not read."""

    images: list[Entry]
    folders: set[str]
    others: dict[str, str]
    unread: list[str]


Classes = dict[str, list[ImageFile]]


def read_layout(containers: list[Container]) -> dict[str, Classes]:
    """Returns the images of all containers by split ("" where there are none) and class.

    Folders above a whole dataset, as many tars have one, make no difference.

    Raises:
      UserError: a container in neither layout, a class without images, or mixed layouts.
    """
    splits: dict[str, Classes] = {}
    empty: list[tuple[str, str, UserError]] = []
    unread: list[str] = []
    for number, container in enumerate(containers):
        contents = _contents(container)
        roots = _roots(container, contents)
        for entry in contents.images:
            root, name, _ = _parts(entry.name)
            if name:
                images = splits.setdefault(roots[root], {}).setdefault(name, [])
                images.append(ImageFile(number, entry))
        empty += _empty_folders(container, contents, roots)
        unread += map(container.describe, contents.unread)
    for split, name, error in empty:
        if not splits.get(split, {}).get(name):  # Another container may hold them.
            raise error
    _check_one_layout(splits, containers, "class/image next to split/class/image")
    _warn_unread(unread)
    return splits


def read_unlabelled(containers: list[Container]) -> dict[str, Classes]:
    """Returns the images of all containers by split, all under NO_CLASS.

    The split is the outermost folder with the name of one; other folders make no difference.

    Raises:
      UserError: a container without images, or images in splits beside others in none.
    """
    splits: dict[str, Classes] = {}
    unread: list[str] = []
    for number, container in enumerate(containers):
        contents = _contents(container)
        if not contents.images:
            found = f"only files such as {min(contents.others.values(), default='')}"
            raise UserError(
                f"expected images ({', '.join(EXTENSIONS)}) in {container.path}, found "
                f"{found if contents.others else 'none'}; add some or name another folder"
            )
        for entry in contents.images:
            folders = entry.name.split("/")[:-1]
            split = next((folder for folder in folders if folder in SPLITS), _NO_SPLIT)
            images = splits.setdefault(split, {}).setdefault(NO_CLASS, [])
            images.append(ImageFile(number, entry))
        unread += map(container.describe, contents.unread)
    _check_one_layout(splits, containers, f"images in {' or '.join(SPLITS)} and others beside them")
    _warn_unread(unread)
    return splits


def _check_one_layout(splits: dict[str, Classes], containers: list[Container], found: str) -> None:
    if _NO_SPLIT in splits and len(splits) > 1:
        raise UserError(
            f"expected one layout in all files, found {found} in "
            f"{', '.join(container.path for container in containers)}; name files of one layout"
        )


def _warn_unread(unread: list[str]) -> None:
    if unread:
        _log.warning("%s", _unread_message(unread))


def _contents(container: Container) -> _Contents:
    contents = _Contents([], set(), {}, [])
    for entry in container.entries():
        folder, _, name = entry.name.rpartition("/")
        if entry.is_folder:
            contents.folders.add(folder)
        elif name.lower().endswith(EXTENSIONS):
            contents.images.append(entry)
        else:
            contents.others[folder] = min(name, contents.others.get(folder, name))
            if name.lower().endswith(_UNREAD):
                contents.unread.append(entry.name)
    return contents


def _unread_message(names: list[str]) -> str:
    counts = collections.Counter(os.path.splitext(name)[1].lower() for name in names)
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    return (
        f"{len(names)} image files are left out, of types that are not read ({kinds}; one is "
        f"{min(names)}): convert them to one of {', '.join(EXTENSIONS)} to use them"
    )


def _parts(name: str) -> tuple[str, str, str]:
    """Returns the folder of the classes, the class and the file name of an image."""
    folder, _, file = name.rpartition("/")
    root, _, class_name = folder.rpartition("/")
    return root, normalised(class_name), file


def _roots(container: Container, contents: _Contents) -> dict[str, str]:
    """Returns the folders that hold class folders, each with its split."""
    samples: dict[str, str] = {}
    for entry in contents.images:
        if "/" in entry.name:
            root = _parts(entry.name)[0]
            samples[root] = min(entry.name, samples.get(root, entry.name))
    wanted = (
        f"expected the images of {container.path} as class/image or, in splits named "
        f"{', '.join(SPLITS)}, as split/class/image"
    )
    if not samples:
        if contents.folders:
            raise _no_images(container, min(contents.folders), contents.others)
        found = f"{contents.images[0].name} directly in it" if contents.images else "no image"
        raise UserError(f"{wanted}, found {found}; make a folder for each class")
    tops = {root.rpartition("/")[0] for root in samples}
    if len(tops) == 1 and all(root.rpartition("/")[2] in SPLITS for root in samples):
        top = f"{tops.pop()}/".lstrip("/")
        roots = {top + split: split for split in SPLITS if top + split in contents.folders}
        for root in sorted(roots.keys() - samples.keys()):
            below = [folder for folder in contents.folders if folder.startswith(root + "/")]
            raise _no_images(container, min(below, default=root), contents.others)
        return roots
    if len(samples) > 1:
        found = " and ".join(samples[root] for root in sorted(samples)[:2])
        raise UserError(f"{wanted}, found {found}; move or remove some of them")
    return dict.fromkeys(samples, _NO_SPLIT)


def _empty_folders(
    container: Container, contents: _Contents, roots: dict[str, str]
) -> list[tuple[str, str, UserError]]:
    """Returns split, class and message for every class folder without an image."""
    filled = {entry.name.rpartition("/")[0] for entry in contents.images}
    empty = []
    for folder in sorted(contents.folders - filled):
        root, _, name = folder.rpartition("/")
        if root in roots:
            empty.append(
                (roots[root], normalised(name), _no_images(container, folder, contents.others))
            )
    return empty


def _no_images(container: Container, folder: str, others: dict[str, str]) -> UserError:
    found, advice = "none", "add images"
    if folder in others:
        found, advice = f"only files such as {others[folder]}", "add images, converted if need be,"
    return UserError(
        f"expected images ({', '.join(EXTENSIONS)}) in the class folder "
        f"{container.describe(folder)}, found {found}; {advice} or remove the folder"
    )
