"""Under which names a family's weights stand in other people's checkpoints: a table, as data.

`interop` reads it in both directions. Names are of modules and hold their parameters as PyTorch's
Linear, Embedding and LayerNorm do; what is stored in another way is marked here.
"""

import dataclasses
from collections.abc import Mapping

Names = str | tuple[str, ...]  # several where releases differ; the first is written


@dataclasses.dataclass(frozen=True)
class Stored:
    """What stands under a name in a form of its own."""

    names: Names


@dataclasses.dataclass(frozen=True)
class Gate(Stored):
    """A gate: one small module for each head, which are one parameter here."""


@dataclasses.dataclass(frozen=True)
class Patches(Stored):
    """A Conv2d with stride = kernel size, a Dense on flattened patches here.

    The family's config has `patch_size` and `channels`.
    """


@dataclasses.dataclass(frozen=True)
class Batched(Stored):
    """A single tensor with one more axis, of size 1, in front."""


@dataclasses.dataclass(frozen=True)
class Part(Stored):
    """A Linear that shares a matrix with others.

    Attributes:
      index: its place among them.
      of: how many they are.
    """

    index: int
    of: int


@dataclasses.dataclass(frozen=True)
class WeightNames:
    """The names of one source; `{i}` is a layer and `{root}` what precedes a model's body.

    Attributes:
      source: whose names these are, for `to_state_dict`.
      anchor: a tensor within the body that no model is without, by which it is found.
      names: path of a module or parameter of ours -> its name there. What a configuration does not
        have is passed over; the rest is read in this order.
      roots: what may precede the body, each ending in a dot but ""; the first that fits counts, and
        the first of all is written.
      heads: path of a module of ours behind the layers -> (what its names begin with, the class
        there that has it): what an encoder alone lacks.
      tied: path of a parameter of ours -> a second name of its tensor.
      unused: tensors that may be there without a place here.
      positions: buffers that may be there if they count positions from 0.
      refused: path of ours -> why nothing there fills it; `{config}` is the family's.
    """

    source: str
    anchor: str
    names: Mapping[str, Names | Stored]
    roots: tuple[str, ...] = ("",)
    heads: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


def below(ours: str, theirs: str, names: Mapping[str, Names | Stored]) -> dict[str, Names | Stored]:
    """Returns a part of a table with what precedes its paths and its names put before them."""

    def full(name: Names | Stored) -> Names | Stored:
        if isinstance(name, Stored):
            return dataclasses.replace(name, names=full(name.names))  # type: ignore[arg-type]
        return theirs + name if isinstance(name, str) else tuple(theirs + n for n in name)

    return {ours + path: full(name) for path, name in names.items()}
