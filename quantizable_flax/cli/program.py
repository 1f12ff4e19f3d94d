"""What the command lines share: flags that fail in one sentence, and exit status 2 for mistakes."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from quantizable_flax.cli import recipes
from quantizable_flax.config import check_set
from quantizable_flax.config.migration import name_of_now
from quantizable_flax.errors import UserError, check_at_least
from quantizable_flax.runtime import terminal

MISTAKE = 2
OVERRIDES = ("config.",)  # flags of eval.py that change a run's configuration

T = TypeVar("T")


def run(main: Callable[[list[str]], None], unknown_prefix: tuple[str, ...] = ()) -> None:
    """Parses flags, runs main(arguments left over), and turns a UserError into exit status 2.

    Args:
      main: gets the program's name and the arguments that are no flags.
      unknown_prefix: unknown flags that start so are handed to main too, e.g. "config.".
    """

    def guarded(arguments: list[str]) -> None:
        _set_up_logging()
        try:
            main(arguments)
        except UserError as error:
            fail(error)

    terminal.tolerate()
    app.run(guarded, flags_parser=lambda arguments: _parse(arguments, unknown_prefix))


def _set_up_logging() -> None:
    """Our own lines plainly on stderr; of the libraries (Orbax is talkative) only errors."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    # What Orbax's threads log with their stack traces, Orbax raises too, and we say in a sentence.
    absl_logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("quantizable_flax")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written stops nothing


def fail(error: Exception | str) -> None:
    """Prints one sentence to stderr and exits with status 2."""
    with contextlib.suppress(OSError):  # the status says so too
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(MISTAKE)


def _parse(arguments: list[str], unknown_prefix: tuple[str, ...]) -> list[str]:
    for argument in arguments[1:]:
        if argument.startswith("--quant."):  # so it was written until 0.2.0
            fail(f"{argument} is written --config.{argument[2:]} now.")
    passed = [a for a in arguments[1:] if a.lstrip("-").startswith(unknown_prefix)]
    try:
        given = recipes.with_paths([a for a in arguments if a not in passed])
        return [*flags.FLAGS(given), *passed]
    except UserError as error:
        fail(error)
    except (flags.Error, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        # absl and ml_collections report a bad flag by any of these.
        fail(_one_line(error, arguments))
    return []


def _one_line(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, (KeyError, AttributeError)) and error.args:  # by ml_collections
        words = re.findall(r"\w+", str(error.args[0]).replace("\\n", " "))
        hint = f" (did you mean {words[words.index('mean') + 1]!r}?)" if "mean" in words else ""
        paths = [a.lstrip("-").partition("=")[0].removeprefix("config.") for a in arguments]
        path = next((path for path in paths if words[0] in path.split(".")), words[0])
        return f"unknown configuration key {path}{name_of_now(path) or hint}."
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def loaded(config: ConfigDict | None) -> ConfigDict:
    """Returns the value of a config-file flag.

    Raises:
      UserError: the flag was not given, its file could not be loaded, or a key is None that must
        have a value.
    """
    if config is None:
        raise UserError("--config is required; see --help.")
    try:
        config.keys()
    except OSError as error:
        raise UserError(
            f"the file of --config could not be loaded: {str(error).splitlines()[-1].strip()}"
        ) from error
    check_set(config)
    return config


def reject_rest(arguments: list[str]) -> None:
    """Raises UserError for a positional argument; arguments[0] is the program."""
    if len(arguments) > 1:
        raise UserError(f"unexpected argument {arguments[1]!r}: flags are written --name=value.")


def at_least(least: int, name: str, value: int) -> None:
    """Raises UserError if the number of a flag is below the least."""
    check_at_least(least, f"--{name}", value)


def required(name: str, value: T | None) -> T:
    """Returns the value of a flag.

    Raises:
      UserError: the flag was not given.
    """
    if not value:
        raise UserError(f"--{name} is required; see --help.")
    return value
