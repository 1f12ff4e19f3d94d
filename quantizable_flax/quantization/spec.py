"""What to quantize and how, as one hashable value: `QuantSpec`, and its short name `w8a8`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from quantizable_flax.errors import UserError, check_choice, nearest
from quantizable_flax.quantization.libraries import AQT, check_library

WEIGHT_ESTIMATORS = ("minmax", "mse")
ACTIVATION_ESTIMATORS = ("minmax", "mse", "mse_last")  # see estimators.py
MIN_BITS, MAX_BITS = 2, 16
INT8_BITS = 8  # the most that one int8 code holds
BACKENDS = ("simulated", "int8")
ACTIVATION_RANGES = ("static", "token")
# Features of layers and embeddings, and the kernels that read them; not what is split into heads,
# nor what a tied head reads.
HADAMARD = "|".join(
    (
        r"(embeddings/|layer_\d+/)(.*/)?(\w*layer_norm|ffn_in|ffn_out|attention/output)/output",
        r"layer_\d+/((attention|ffn)_residual|attention/(gated_)?context)",
        r"embeddings/(\w+_)?sum",
        r"layer_\d+/(attention/(query|key|value|output)|ffn_in|ffn_out)/weight",
        r"(mlm_head/dense|pooler)/weight",
    )
)
BIT_FIELDS = ("weight_bits", "activation_bits", "layer_norm_bits", "final_layer_norm_bits")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The published scheme by default: per-tensor, symmetric weights, asymmetric activations.

    Attributes:
      weight_bits: 2..16, or None to leave weights in floating point.
      activation_bits: 2..16, or None to leave activations in floating point.
      weight_estimator: "minmax" or "mse" (grid search).
      weight_percentile: with "minmax", the p of a (100 - p, p) range, e.g. 99.99, None for min-max.
      weight_per_channel: one scale per output channel (per row of an embedding table).
      activation_estimator: "minmax" (running), "mse" (least squared error over all calibration
        batches) or "mse_last" (of the last batch alone, as the original code).
      activation_symmetric: symmetric instead of asymmetric activation grids.
      momentum: of the running min-max over calibration batches, in [0, 1).
      percentile: the same as weight_percentile for activations.
      head: also quantize the head (its weights and the logits), where the family's head can be.
      layer_norm_bits: of the scales and outputs of all LayerNorms, None as everything else.
      final_layer_norm_bits: the same for the LayerNorm before the head alone.
      activation_ranges: "static", from calibration, or "token": each row's own minimum and maximum
        at run time (a token's features, a query's scores and probabilities).
      float_sites: sites whose full path matches this regular expression stay in floating point.
      site_bits: (regular expression, bits) pairs; the first that matches a site's full path
        decides its bits.
      backend: "simulated" in float32, or "int8": codes of at most 8 bits are integers, and
        products of two such tensors run as s8 x s8 -> s32.
      gated_context: where the published scheme puts the context's grid before the gate (OPT),
        add one behind it, so that nothing enters the output projection unquantized.
      hadamard: sites whose full path matches this regular expression are rotated by a Hadamard
        matrix before their grid, activations along their features and weights along the axis that
        products sum over, see hadamard.py; None for none.
      library: "aqt", or "qwix" where it is installed: which does the rounding and the products of
        integers; the numbers are the same.
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    weight_estimator: str = "minmax"
    weight_percentile: float | None = None
    weight_per_channel: bool = False
    activation_estimator: str = "minmax"
    activation_symmetric: bool = False
    momentum: float = 0.9
    percentile: float | None = None
    head: bool = False
    layer_norm_bits: int | None = None
    final_layer_norm_bits: int | None = None
    activation_ranges: str = "static"
    float_sites: str | None = None
    site_bits: tuple[tuple[str, int], ...] = ()
    backend: str = "simulated"
    gated_context: bool = True
    hadamard: str | None = None
    library: str = AQT

    def __post_init__(self):
        """Raises UserError for a field outside its domain."""
        for field in BIT_FIELDS:
            bits = getattr(self, field)
            if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
                raise UserError(f"quant {field} must be in {MIN_BITS}..{MAX_BITS}, found {bits}.")
        check_choice("quant.weight_estimator", self.weight_estimator, WEIGHT_ESTIMATORS)
        check_choice("quant.activation_ranges", self.activation_ranges, ACTIVATION_RANGES)
        check_choice("the backend", self.backend, BACKENDS)
        check_library(self.library)
        for pattern in self.patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}.") from error
        for pattern, bits in self.site_bits:
            if not MIN_BITS <= bits <= MAX_BITS:
                raise UserError(
                    f"quant.site_bits must be in {MIN_BITS}..{MAX_BITS}, found {bits} for "
                    f"{pattern!r}."
                )
        check_choice("quant.activation_estimator", self.activation_estimator, ACTIVATION_ESTIMATORS)
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"quant.momentum must be in [0, 1), found {self.momentum}.")
        self._check_percentile("percentile", "activation_estimator")
        self._check_percentile("weight_percentile", "weight_estimator")

    def _check_percentile(self, field: str, estimator: str) -> None:
        percentile = getattr(self, field)
        if percentile is None:
            return
        if not 50.0 < percentile <= 100.0:
            raise UserError(f"quant.{field} must be in (50, 100], found {percentile}.")
        if getattr(self, estimator) != "minmax":
            raise UserError(
                f"quant.{field} is of quant.{estimator}=minmax, found {getattr(self, estimator)}: "
                "set one of the two."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantSpec":
        """Rebuilds a spec from `dataclasses.asdict(spec)`, also after JSON or of 0.1.0."""
        fields = {"float_sites" if name == "skip" else name: v for name, v in values.items()}
        site_bits = tuple((pattern, bits) for pattern, bits in values["site_bits"])
        return cls(**{**fields, "site_bits": site_bits})

    def patterns(self) -> list[str]:
        """The regular expressions that must each match a site."""
        return [
            *(pattern for pattern in (self.float_sites, self.hadamard) if pattern),
            *(pattern for pattern, _ in self.site_bits),
        ]

    def bits(self, site: str, *, weight: bool = False) -> int | None:
        """Bits of a site by its full path, e.g. `layer_0/attention/scores`; None: not quantized."""
        if self.float_sites and re.fullmatch(self.float_sites, site):
            return None
        for pattern, bits in self.site_bits:
            if re.fullmatch(pattern, site):
                return bits
        return self.weight_bits if weight else self.activation_bits

    def rotates(self, site: str) -> bool:
        """Whether a site is rotated before its grid."""
        return self.hadamard is not None and re.fullmatch(self.hadamard, site) is not None

    def serves_int8(self, site: str) -> bool:
        """Whether an activation is int8 codes on one grid for the whole tensor, heads included."""
        bits = self.bits(site)
        static = self.activation_ranges == "static" and not self.rotates(site)
        return static and bits is not None and self.holds_int8(bits)

    def holds_int8(self, bits: int) -> bool:
        """Whether codes of so many bits are int8."""
        return self.backend == "int8" and bits <= INT8_BITS

    def for_layer_norm(self, *, final: bool = False) -> "QuantSpec":
        """The spec of a LayerNorm, `final` for the one before the head."""
        bits = (self.final_layer_norm_bits if final else None) or self.layer_norm_bits
        if bits is None:
            return self
        return dataclasses.replace(
            self,
            weight_bits=self.weight_bits and bits,
            activation_bits=self.activation_bits and bits,
        )


COVERAGES: dict[str, dict[str, bool | int]] = {
    "all": {"head": True},
    "fp32_head": {"head": False},
    "int16_final_LN": {"final_layer_norm_bits": 16},
    "int16_all_LN": {"layer_norm_bits": 16},
}


def parse_coverage(name: str) -> dict[str, Any]:
    """Reads a published coverage such as `fp32_head+int16_all_LN` as fields of `QuantSpec`.

    Raises:
      UserError: a part that is none, or neither or both of `all` and `fp32_head`.
    """
    fields: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in COVERAGES:
            raise UserError(
                f"quant.coverage must be made of {', '.join(COVERAGES)} joined by +, found {part!r}"
                f"{nearest(part, COVERAGES)}."
            )
        if COVERAGES[part].keys() & fields.keys():
            raise UserError(f"quant.coverage must name each of its parts once, found {name!r}.")
        fields |= COVERAGES[part]
    if "head" not in fields:
        raise UserError(f"quant.coverage must contain all or fp32_head, found {name!r}.")
    return fields


def parse_bits(name: str) -> tuple[int | None, int | None]:
    """Reads `w8a8`, `w8` (weights only) or `a8` (activations only) as (weight, activation) bits.

    Raises:
      UserError: any other text.
    """
    match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?", name)
    if not name or match is None:
        raise UserError(
            f"a bit width must read like w8a8, w4a8, w8 or a8, found {name!r}: write w for weight "
            "bits and a for activation bits."
        )
    weight, activation = (int(bits) if bits else None for bits in match.groups())
    return weight, activation
