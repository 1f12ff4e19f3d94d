"""What a run has logged of itself, from its metrics.jsonl."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.checkpoint import store

Curve = Sequence[tuple[int, float]]  # of (step, value), by step


class History(NamedTuple):
    """How a run went; a curve is empty where the run has not logged it.

    Attributes:
      validation: the metric on the validation split.
      max_inf_norm: the largest infinity norm over the published sites, of one training batch.
      avg_kurtosis: the mean kurtosis over them.
    """

    validation: Curve = ()
    max_inf_norm: Curve = ()
    avg_kurtosis: Curve = ()


def history(path: str, metric: str) -> History:
    """Returns what the run at a path has logged, the last line of each step; all empty of none.

    Args:
      path: of a workdir or of one of its steps.
      metric: the name of the validation metric.
    """
    validation: dict[int, float] = {}
    norms: dict[int, float] = {}
    kurtoses: dict[int, float] = {}
    for line in _lines(path):
        if line.get("group") == "validation" and metric in line:
            validation[line["step"]] = float(line[metric])
        elif line.get("group") == "telemetry":
            norms[line["step"]] = _over(line, ":inf_norm", np.max)
            kurtoses[line["step"]] = _over(line, ":kurtosis", np.mean)
    return History(*(sorted(curve.items()) for curve in (validation, norms, kurtoses)))


def _over(line: dict[str, Any], statistic: str, fold: Any) -> float:
    """The statistic of all sites as one number; `float` reads the words for what is not finite."""
    found = [float(value) for name, value in line.items() if name.endswith(statistic)]
    return float(fold(found)) if found else float("nan")


def _lines(path: str) -> Iterator[dict[str, Any]]:
    log = store.split_step(store.absolute(path))[0] / "metrics.jsonl"
    if not log.exists():
        return
    for text in log.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # one that a killed run left unfinished
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line
