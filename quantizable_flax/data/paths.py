"""Local paths as the configuration writes them: separated by commas, with globs."""

import glob
import os
from collections.abc import Iterable, Iterator

from quantizable_flax.errors import UserError


def matched(patterns: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each path or glob with what it matches, sorted; a path that exists is no glob."""
    for pattern in filter(None, (part.strip() for part in str(patterns).split(","))):
        expanded = os.path.expanduser(pattern)
        literal = os.path.exists(expanded)
        yield pattern, [expanded] if literal else sorted(glob.glob(expanded, recursive=True))


def check_disjoint(
    train: Iterable[str | os.PathLike], validation: Iterable[str | os.PathLike]
) -> None:
    """Raises UserError for a path that is in data.files and in data.validation_files."""
    shared = {os.path.realpath(p) for p in train} & {os.path.realpath(p) for p in validation}
    if shared:
        raise UserError(
            f"expected different files for training and validation, found {min(shared)} in "
            "both; take it out of data.files or of data.validation_files"
        )
