"""Printing results: on a stream that lacks characters, and to a reader who leaves early."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from quantizable_flax.errors import UserError

PLAIN = {"±": "+-", "…": "..."}
_HANDLER = "quantizable_flax.plain"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escaped), error.end


codecs.register_error(_HANDLER, _plainly)


def encodable(text: str, stream: TextIO) -> str:
    """Returns the text with what the stream cannot encode in other words: `+-` or an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def tolerate() -> None:
    """Lets stdout and stderr take any text: an ASCII locale is no reason to end a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Prints results within; a reader who has seen enough, as `head`, is no mistake.

    Raises:
      UserError: stdout cannot be written for another reason, such as a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python flushes again at its end, and would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(
                f"stdout cannot be written ({error.strerror or error}): make room where it is "
                "redirected to."
            ) from error
