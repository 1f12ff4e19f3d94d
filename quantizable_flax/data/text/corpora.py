"""Which corpora data.source names, and with what weights."""

import dataclasses
import re
from fractions import Fraction

from ml_collections import ConfigDict

from quantizable_flax.data.hub_library import HUB
from quantizable_flax.errors import UserError, nearest

EMBEDDED, FILES, TFDS = "embedded", "files", "tfds:"
_VALID = ("auto", EMBEDDED, FILES, TFDS + "NAME", HUB + "NAME[,CONFIG]")
_KNOWN = re.compile(rf"{EMBEDDED}|{FILES}|{TFDS}.+|{HUB}[^,].*")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One part of the text.

    Attributes:
      name: "embedded", "files", "tfds:NAME", "hf:NAME" or "hf:NAME,CONFIG".
      config: config.data with this corpus as its only source.
      weight: its share of the training blocks, relative to the others'; None to follow them.
    """

    name: str
    config: ConfigDict
    weight: Fraction | None


def corpora(data_cfg: ConfigDict) -> list[Corpus]:
    """Returns the corpora of data.source, separated by commas, each with or without `*WEIGHT`.

    Behind `hf:NAME` and a comma, what is no corpus is the configuration of that dataset.

    Raises:
      UserError: an unknown corpus, a bad weight, some with a weight and some without, or
        data.files that no corpus reads.
    """
    parts = _parts(str(data_cfg.source))
    if parts == ["auto"]:
        parts = [FILES if data_cfg.files else EMBEDDED]
    named = [_parse(part) for part in parts]
    if len({weight is None for _, weight in named}) > 1:
        raise UserError(
            f"expected a weight on every corpus of data.source or on none, found "
            f"{data_cfg.source!r}; write for example tfds:lm1b*0.7,files*0.3"
        )
    if data_cfg.files and FILES not in [name for name, _ in named]:
        raise UserError(
            f"expected data.files to be empty for data.source={str(data_cfg.source)!r}, found "
            f"{data_cfg.files!r}; leave one of them out"
        )
    return [Corpus(name, _alone(data_cfg, name), weight) for name, weight in named]


def _parts(source: str) -> list[str]:
    """Returns what stands between the commas, a dataset of the hub with its configuration."""
    parts: list[str] = []
    for part in map(str.strip, source.split(",")):
        before = parts[-1] if parts else ""
        if before.startswith(HUB) and not {",", "*"} & {*before} and _is_config(part):
            parts[-1] = f"{before},{part}"
        else:
            parts.append(part)
    return parts


def _is_config(part: str) -> bool:
    name = part.partition("*")[0].strip()
    return bool(name) and not _KNOWN.fullmatch(name)


def _parse(part: str) -> tuple[str, Fraction | None]:
    name, star, weight = (piece.strip() for piece in part.partition("*"))
    if not _KNOWN.fullmatch(name):
        raise UserError(
            f"expected data.source among {', '.join(_VALID)}, found {name!r}{nearest(name, _VALID)}"
        )
    if not star:
        return name, None
    try:
        value = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise UserError(
            f"expected a weight above 0 in data.source, found {part!r}; "
            f"write for example {name}*0.5"
        )
    return name, value


def _alone(data_cfg: ConfigDict, name: str) -> ConfigDict:
    single = data_cfg.copy_and_resolve_references()
    single.source = name
    if name != FILES:
        single.files = None
    return single
