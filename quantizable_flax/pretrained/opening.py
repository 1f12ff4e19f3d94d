"""What every format of weights shares: checks before it is read, one sentence for damage."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from quantizable_flax.errors import UserError

_POINTER = b"version https://git-lfs"


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for, and anew every time."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        """Takes, by name, what reads the tensor."""
        self.readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def check_file(path: Path) -> None:
    """Raises UserError unless there is a file with content, itself and not a pointer to it."""
    if not os.path.isfile(path):
        broken = "a link that leads nowhere" if os.path.islink(path) else "nothing there"
        raise UserError(
            f"expected a file at {path}, found {'no file' if os.path.exists(path) else broken}; "
            "correct the path, or fetch the model again"
        )
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError as error:
        raise unreadable(path, error) from None
    if start == _POINTER:
        raise UserError(
            f"expected weights in {path}, found the pointer of Git LFS that stands for them; run "
            "`git lfs pull` in that folder"
        )
    if not start:
        raise UserError(f"expected weights in {path}, found an empty file; fetch or save it again")


def unreadable(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that the system does not let us read."""
    return UserError(
        f"expected to be able to read {path}, found '{error.strerror or error}'; correct its "
        "permissions, or fetch it again"
    )


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever reading a file raises into one UserError.

    Args:
      path: the file.
      what: what it should hold, as in "expected WHAT in PATH".
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:  # bytes of strangers, parsed by several libraries
        raise UserError(
            f"expected {what} in {path}, found it damaged or cut short ({first_line(error)}); "
            "fetch or save it again"
        ) from None


def first_line(error: BaseException) -> str:
    """Returns what an error says, in one line, or what it is called."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
