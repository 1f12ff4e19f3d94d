"""Names of tensors without what training frameworks put around or into them."""

from collections.abc import Iterable
from typing import NamedTuple

from quantizable_flax.errors import UserError

# Parts that wrappers add at any depth: torch.compile, DDP, FSDP, activation checkpointing.
WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)


class Place(NamedTuple):
    """Where a model stands in a state dict.

    Attributes:
      outer: what precedes every name of the whole model, e.g. `model.` under Lightning.
      root: what precedes the names of its body behind that, e.g. `bert.`.
    """

    outer: str
    root: str


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Returns plain name -> name as it stands in the state dict.

    Raises:
      UserError: two names differ by their wrappers alone.
    """
    plain: dict[str, str] = {}
    for name in names:
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise UserError(
                f"tensors {plain[short]!r} and {name!r} are the same one of two models: give the "
                "tensors of one model alone."
            )
        plain[short] = name
    return plain


def find(names: Iterable[str], anchor: str, roots: tuple[str, ...]) -> Place | None:
    """Finds the model by one tensor that it cannot be without, None where that is missing.

    Args:
      names: plain ones.
      anchor: the tensor's name within the body.
      roots: what may precede it within the whole model, each ending in a dot but ""; the first
        that fits counts, without one the first of all.

    Raises:
      UserError: several such tensors, so several models.
    """
    found = sorted(name for name in names if f".{name}".endswith(f".{anchor}"))
    if not found:
        return None
    if len(found) > 1:
        raise UserError(
            f"the weights hold several models, found {found[0]!r} and {found[1]!r}: give the "
            "tensors of one model alone."
        )
    before = found[0].removesuffix(anchor)
    for root in roots:
        if f".{before}".endswith(f".{root}"):
            return Place(before.removesuffix(root), root)
    return Place(before, roots[0])
