"""Whether a run may write where it is told to, asked before anything is compiled."""

import errno
import uuid

from etils import epath

from quantizable_flax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError unless files can be written below the workdir, which need not exist yet.

    Writes and deletes a small file in the nearest folder that exists; in a bucket that is the
    bucket itself at the latest.
    """
    try:
        folder = workdir
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        probe = folder / f".writable_{uuid.uuid4().hex}"
        try:
            probe.write_text("one byte at least, for a disk may be full")
        finally:
            probe.unlink(missing_ok=True)
    except Exception as error:  # every storage library has its own
        raise UserError(unwritable(workdir, error)) from error


def unwritable(workdir: epath.Path, error: Exception) -> str:
    """A sentence about a workdir that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    advice = "give this account the right to read, write and delete there"
    if getattr(error, "errno", None) in FULL:
        advice = "make room there"
    return (
        f"--workdir={workdir} cannot be written ({reason.splitlines()[0]}): {advice}, or choose "
        "another --workdir."
    )
