"""What stands in one column of the results: `w8a8`, `w6a8+mse`, `w8a8+smooth=0.5`, ..."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError, check_at_least, check_choice
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.shapes import boxed_shapes
from quantizable_flax.ptq.calibrate import unknown_ranges
from quantizable_flax.ptq.smoothquant import check_smooth
from quantizable_flax.quantization.spec import HADAMARD, QuantSpec, parse_bits, parse_coverage

SMOOTH_STRENGTH = 0.5  # the published default of SmoothQuant


@dataclasses.dataclass(frozen=True)
class Setting:
    """Bits and options of one column.

    Attributes:
      name: as it was written, e.g. `w8a8+smooth=0.5`.
      weight_bits, activation_bits: None leaves that side in floating point.
      options: fields of `QuantSpec` that differ from the configuration.
      smooth: migration strength of SmoothQuant before everything else, None for none.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    options: tuple[tuple[str, Any], ...] = ()
    smooth: float | None = None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"+{name} takes a number, found {text!r}: write +{name}=0.5.") from error


# Option -> the fields of QuantSpec that it sets, from the text behind `=`.
OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "token": lambda _: {"activation_ranges": "token"},
    "mse": lambda _: {"weight_estimator": "mse", "weight_percentile": None},
    "act_mse": lambda _: {"activation_estimator": "mse", "percentile": None},
    "channel": lambda _: {"weight_per_channel": True},
    "symmetric": lambda _: {"activation_symmetric": True},
    "percentile": lambda text: {"percentile": _number("percentile", text)},
    "hadamard": lambda _: {"hadamard": HADAMARD},
    "smooth": lambda _: {},
}
VALUED = ("percentile", "smooth")


def parse_setting(name: str | Setting) -> Setting:
    """Reads a column such as `w4a8+mse+channel`.

    `+token`: activation ranges of each token at run time; `+mse`, `+act_mse`: least-squares
    ranges of weights, of activations; `+channel`: weights per channel; `+symmetric`: symmetric
    activation grids; `+percentile=99.99`: of activations; `+hadamard`: rotated features; `+smooth`
    or `+smooth=0.8`: SmoothQuant.

    Raises:
      UserError: unreadable bits, an unknown option, a value where none belongs or none where one
        does.
    """
    if isinstance(name, Setting):
        return name
    bits, *parts = name.split("+")
    weight_bits, activation_bits = parse_bits(bits)
    fields: dict[str, Any] = {}
    smooth = None
    for part in parts:
        option, equals, text = part.partition("=")
        check_choice("an option behind + in --quant", option, OPTIONS)
        if equals and option not in VALUED:
            raise UserError(f"+{option} takes no value, found {part!r}: leave {text!r} away.")
        fields |= OPTIONS[option](text)
        if option == "smooth":
            smooth = _number("smooth", text) if equals else SMOOTH_STRENGTH
    return Setting(name, weight_bits, activation_bits, tuple(fields.items()), smooth)


def parse_settings(names: Sequence[str]) -> list[Setting]:
    """Reads the columns of a table, each once; `["none"]` are none of them.

    Raises:
      UserError: as `parse_setting`.
    """
    return [] if list(names) == ["none"] else [parse_setting(n) for n in dict.fromkeys(names)]


def make_spec(config: ConfigDict, setting: Setting | str, backend: str = "simulated") -> QuantSpec:
    """Returns the scheme of `config.quant` with the bits and options of a setting.

    Raises:
      UserError: unreadable or impossible bit widths or coverage, or a bad key of `config.quant`.
    """
    setting, quant = parse_setting(setting), config.quant
    fields = {field.name for field in dataclasses.fields(QuantSpec)}
    same = {key: quant[key] for key in quant if key in fields - {"site_bits"}}
    return QuantSpec(
        **{
            **same,
            **parse_coverage(quant.coverage),
            **dict(setting.options),
            "weight_bits": setting.weight_bits,
            "activation_bits": setting.activation_bits,
            "site_bits": parse_site_bits(quant.site_bits),
            "backend": backend,
        }
    )


def parse_site_bits(text: str) -> tuple[tuple[str, int], ...]:
    """Reads `layer_0/.*=4 .*/scores=16`: regular expressions and bits, parted by spaces.

    Raises:
      UserError: a part without `=` and a number behind it.
    """
    pairs = []
    for part in text.split():
        pattern, _, bits = part.rpartition("=")
        if not pattern or not re.fullmatch(r"\d+", bits):
            raise UserError(
                f"quant.site_bits must read like 'layer_0/.*=4 .*/scores=16', found {part!r}."
            )
        pairs.append((pattern, int(bits)))
    return tuple(pairs)


def site_names(model: nn.Module, spec: QuantSpec) -> list[str]:
    """Every site of the model that the spec's coverage quantizes, whatever its patterns say."""
    plain = dataclasses.replace(
        spec,
        weight_bits=8,
        activation_bits=8,
        activation_ranges="static",
        float_sites=None,
        hadamard=None,
        site_bits=(),
        backend="simulated",
    )
    ranges = traverse_util.flatten_dict(_shapes_of_ranges(with_quant(model, plain)))
    return sorted("/".join(path[:-1]) for path in ranges)


def _shapes_of_ranges(model: nn.Module) -> Any:
    params = nn.unbox(boxed_shapes(with_quant(model, None)))
    return unknown_ranges(model, params, model.example_batch())


def check_spec(model: nn.Module, spec: QuantSpec) -> None:
    """Raises UserError for a spec that does not fit the model.

    Such as a coverage that names what the model lacks, or an expression of `float_sites`,
    `hadamard` or `site_bits` that matches no site, or a rotation of a width that has none.
    """
    with_quant(model, spec)
    if not spec.patterns():
        return
    key = "quant.float_sites, quant.hadamard or quant.site_bits"
    check_patterns(key, spec.patterns(), site_names(model, spec))
    if spec.hadamard:  # every rotation is traced, of whatever width
        _shapes_of_ranges(with_quant(model, dataclasses.replace(spec, backend="simulated")))


def check_setting(model: nn.Module, config: ConfigDict, setting: Setting) -> None:
    """Raises UserError for a setting that the model of a configuration cannot be evaluated in."""
    check_at_least(1, "quant.calibration_batches", config.quant.calibration_batches)
    check_spec(model, make_spec(config, setting))
    if setting.smooth is not None:
        check_smooth(model, setting.smooth)


def check_patterns(
    key: str, patterns: Iterable[str], names: Sequence[str], what: str = "sites"
) -> list[str]:
    """Returns the names that some of the regular expressions match in full.

    Raises:
      UserError: one of them is none, or matches none of the names.
    """
    matched = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(
                f"{key} must be a regular expression, found {pattern!r} ({error}): correct it."
            ) from error
        if not found:
            close = sorted(names, key=lambda name: _distance(pattern, name))[:5]
            raise UserError(
                f"the expression {pattern!r} of {key} matches none of the {len(names)} {what} in "
                f"full: the nearest are {', '.join(close)}."
            )
        matched |= found
    return [name for name in names if name in matched]


def _distance(pattern: str, name: str) -> float:
    """How far an expression, without its special characters, is from a name or a part of it."""
    plain = re.sub(r"[.*?+^$()\[\]|\\]", "", pattern)
    return -max(
        difflib.SequenceMatcher(None, plain, part).ratio() for part in [name, *name.split("/")]
    )
