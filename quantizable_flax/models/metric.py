"""What a family is judged by, from the mean loss and the share of right answers."""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of merit.

    Attributes:
      name: as in logs and JSON.
      label: as in tables, short.
      larger_is_better: whether more is better.
      value: (mean loss in nats, share of right answers in [0, 1]) -> the figure.
      cost: (quantized, floating point) -> what quantization costs, in `cost_label`'s unit.
      cost_label: the unit of a cost, for an axis.
      sensitivity_label: of what one quantized site costs, see `ptq.sensitivity`.
    """

    name: str
    label: str
    larger_is_better: bool
    value: Callable[[float, float], float]
    cost: Callable[[float, float], float]
    cost_label: str
    sensitivity_label: str = "loss increase (nats)"


def _perplexity(loss: float, _: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)  # exp(nan) is nan


PERPLEXITY = Metric(
    name="perplexity",
    label="ppl",
    larger_is_better=False,
    value=_perplexity,
    cost=lambda quantized, floating: math.log(quantized / floating),
    cost_label="loss increase (nats per token)",
)
TOP1 = Metric(
    name="top1",
    label="top-1 %",
    larger_is_better=True,
    value=lambda _, right: 100.0 * right,
    cost=lambda quantized, floating: floating - quantized,
    cost_label="accuracy lost (points)",
)
# Of models without a head, or on data without labels: `evaluation/fidelity.py` measures it.
FIDELITY = Metric(
    name="fidelity",
    label="cosine",
    larger_is_better=True,
    value=lambda _, __: math.nan,
    cost=lambda quantized, floating: floating - quantized,
    cost_label="cosine lost",
    sensitivity_label="cosine lost",
)
METRICS = {metric.name: metric for metric in (PERPLEXITY, TOP1, FIDELITY)}
