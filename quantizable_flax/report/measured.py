"""What is collected of a model for its report, as plain arrays of numpy."""

import dataclasses
from typing import NamedTuple

import numpy as np

SIGMAS = 6.0  # a value further than this from the mean is an outlier (arXiv 2306.12929, section 3)
BULK = (0.5, 99.5)  # percentiles: what lies between is 99 % of the values


class SiteFigures(NamedTuple):
    """Means over examples: of max|x|, and of the kurtosis of all their values."""

    inf_norm: float
    kurtosis: float


class Histogram(NamedTuple):
    """Counts [N] of what lies between edges [N + 1]."""

    counts_N: np.ndarray
    edges: np.ndarray


class Carrier(NamedTuple):
    """A kind of token that carries outliers.

    Attributes:
      token: its text.
      occurrences: how often it stands in the examples.
      carrying: how many of these have an outlier.
      largest: the largest |x| of them.
    """

    token: str
    occurrences: int
    carrying: int
    largest: float


@dataclasses.dataclass(frozen=True)
class Values:
    """What passes one site, over the visible tokens of all examples.

    Attributes:
      site: its full path.
      examples, tokens: how many were looked at.
      low, high: the least and the largest value.
      mean, std: of all values.
      bulk: the percentiles of `BULK`.
      whole: a histogram of all values.
      near: one of the values between the ends of the bulk, a little widened.
      outliers: how many values are further than `SIGMAS` standard deviations from the mean.
      outliers_D: the same by dimension.
      largest_D: the largest |x| by dimension.
      carriers: kinds of tokens with outliers, those with most of them first.
      example: the one with the largest |x|.
      strip_T: its largest |x| by token.
    """

    site: str
    examples: int
    tokens: int
    low: float
    high: float
    mean: float
    std: float
    bulk: tuple[float, float]
    whole: Histogram
    near: Histogram
    outliers: int
    outliers_D: np.ndarray
    largest_D: np.ndarray
    carriers: list[Carrier]
    example: int
    strip_T: np.ndarray

    @property
    def dimensions(self) -> list[int]:
        """Numbers of the dimensions by their largest |x|, the largest first."""
        return [int(i) for i in np.argsort(-self.largest_D, kind="stable")]


class HeadMap(NamedTuple):
    """A head on one example; what passes is as in `Heads`.

    Attributes:
      layer, head: numbers from 0.
      passes: over all examples.
      probs_TxS: its probabilities, a row for each query.
      norms_S: the norm of each key's value, as a share of their mean.
    """

    layer: int
    head: int
    passes: float
    probs_TxS: np.ndarray
    norms_S: np.ndarray

    @property
    def weighted(self) -> np.ndarray:
        """The probabilities [T, S], each times the norm of the value that it lets through."""
        return self.probs_TxS * self.norms_S[None]


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the heads of a model do on real examples.

    Attributes:
      passes_LxH: `g sum_s P_ts |v_s|` over the mean of |v|, averaged over visible queries: how much
        of a value a head lets through. 0 for one that does nothing; g is 1 without gates.
      zeros_LxH: share of the visible probabilities that are exactly 0.
      quiet: those that let least through, the least first.
      gates_LxHxT: gate probabilities on the example of the maps, T or 1; None without gates.
      gate_means_LxH: over all examples and visible tokens.
    """

    passes_LxH: np.ndarray
    zeros_LxH: np.ndarray
    quiet: list[HeadMap]
    gates_LxHxT: np.ndarray | None = None
    gate_means_LxH: np.ndarray | None = None


class Picture(NamedTuple):
    """The image behind an example of ViT.

    Attributes:
      pixels_HxWx3: uint8.
      grid: patches of a column and of a row.
      skipped: tokens before the patches: class token, registers.
    """

    pixels_HxWx3: np.ndarray
    grid: tuple[int, int]
    skipped: int


class GridOver(NamedTuple):
    """The grid that a setting puts over the values of a site.

    Attributes:
      setting: its name.
      low, high: of the calibrated range, with 0 in it.
      step: between two levels.
      levels: how many there are.
      bulk_levels: how many of these the bulk of the values gets.
    """

    setting: str
    low: float
    high: float
    step: float
    levels: int
    bulk_levels: int


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """All that is collected of a model's activations.

    Attributes:
      sites: figures of each site, in the order of the forward pass.
      worst: the values of the site of hidden states with the largest infinity norm.
      heads: None for a model without `MultiHeadAttention`.
      tokens: what the tokens of the example of `worst` are called, [T].
      picture: of that example, of images.
    """

    sites: dict[str, SiteFigures]
    worst: Values
    heads: Heads | None
    tokens: list[str]
    picture: Picture | None = None
