"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear sentence: what was expected, what was found, what to do.

    The command lines print it without a stack trace and exit with status 2.
    """


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError, with the nearest choice, unless value is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(
            f"{what} must be one of {', '.join(choices)}, found {value!r}{nearest(value, choices)}."
        )


def check_at_least(least: int, what: str, value: int) -> None:
    """Raises UserError for a count below the least."""
    if value < least:
        raise UserError(f"{what} must be at least {least}, found {value}.")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the closest valid name, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
