"""What a report shows, as one value for JSON."""

import math
from typing import Any

import numpy as np

from quantizable_flax.report.subject import Subject

MOST = 20  # dimensions, and kinds of tokens


def record(subject: Subject) -> dict[str, Any]:
    """Returns the figures of a subject; what is not finite is None.

    `row` is that of the table; `sites` has infinity norm and kurtosis of every site; `worst` tells
    of the values at the site with the largest infinity norm; `heads` has what passes each head
    [L][H], and the shares of exact zeros; `sensitivity` the cost of each site alone, in the
    setting `sensitivity_setting`.
    """
    anatomy, heads = subject.anatomy, subject.anatomy.heads
    values = anatomy.worst
    worst = {
        **{name: getattr(values, name) for name in ("site", "examples", "tokens", "low", "high")},
        **{name: getattr(values, name) for name in ("mean", "std", "bulk", "outliers")},
        "dimensions": [
            {"dimension": d, "largest": values.largest_D[d], "outliers": values.outliers_D[d]}
            for d in values.dimensions[:MOST]
        ],
        "carriers": [carrier._asdict() for carrier in values.carriers[:MOST]],
    }
    found: dict[str, Any] = {
        "row": subject.row,
        "sites": {site: figures._asdict() for site, figures in anatomy.sites.items()},
        "worst": worst,
        "grid": None if subject.grid is None else subject.grid._asdict(),
        "sensitivity_setting": subject.costed,
        "sensitivity": [cost._asdict() for cost in subject.costs],
        "history": subject.history._asdict(),
    }
    if heads is not None:
        names = ("passes_LxH", "zeros_LxH", "gate_means_LxH")
        found["heads"] = {name: getattr(heads, name) for name in names}
    return _plain(found)


def _plain(value: Any) -> Any:
    """Dicts, lists, strings and finite numbers alone."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
