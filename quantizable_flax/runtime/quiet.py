"""One failed read or write of a checkpoint is one error, not a hundred stack traces."""

import logging
import sys
from typing import Any


class Quiet:
    """Hides what TensorStore prints of its other reads and writes when one of them has failed.

    Within `with Quiet():`, and from then on where that ended by an exception: the others end later.
    """

    def __enter__(self) -> "Quiet":
        previous = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                previous(unraisable)

        self._previous, self._hook = previous, hook
        sys.unraisablehook = hook
        logging.getLogger("asyncio").addFilter(_was_retrieved)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and sys.unraisablehook is self._hook:
            sys.unraisablehook = self._previous
            logging.getLogger("asyncio").removeFilter(_was_retrieved)


def _was_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
