"""Recipes by name: `bert_base:clipped` is the configs/bert_base.py of this checkout or wheel."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from quantizable_flax.errors import UserError, nearest

PACKAGE = Path(__file__).parents[1]
FLAG = "--config"


def folder() -> Path:
    """Returns where the recipes are: beside the package in a checkout, inside an installed one."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def with_paths(arguments: list[str]) -> list[str]:
    """Returns the arguments of a command line with the file in place of a recipe's bare name.

    Raises:
      UserError: no recipe has that name.
    """
    found = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == FLAG and equals:
            argument = f"{FLAG}={path_of(value)}"
        elif index and arguments[index - 1] == FLAG:
            argument = path_of(argument)
        found.append(argument)
    return found


def path_of(recipe: str) -> str:
    """Returns `FILE:VARIANT` for `NAME:VARIANT`; what names a file already stays as it is."""
    name, colon, variant = recipe.partition(":")
    if name.endswith(".py") or "/" in name or not name:
        return recipe
    known = sorted(file.stem for file in folder().glob("[!_]*.py"))
    if name not in known:
        raise UserError(
            f"--config takes a file or one of the recipes {', '.join(known)}, found "
            f"{name!r}{nearest(name, known)}."
        )
    _let_recipes_import_each_other()
    return f"{folder() / name}.py{colon}{variant}"


def _let_recipes_import_each_other() -> None:
    """As `configs.NAME`, wherever the command runs."""
    if "configs" in sys.modules or importlib.util.find_spec("configs") is not None:
        return
    spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    spec.submodule_search_locations = [str(folder())]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
