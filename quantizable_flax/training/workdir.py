"""Whether a run may write where it is told to, asked before anything is compiled."""

import uuid

from etils import epath

from quantizable_flax.errors import UserError


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError unless files can be written below the workdir, which need not exist yet.

    Writes and deletes a file of no content in the nearest folder that exists; in a bucket that is
    the bucket itself at the latest.
    """
    try:
        folder = workdir
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        probe = folder / f".writable_{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # every storage library has its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"--workdir={workdir} cannot be written ({reason.splitlines()[0]}): give this account "
            "the right to read, write and delete there, or choose another --workdir."
        ) from error
