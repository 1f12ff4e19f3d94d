"""Recipes by name: `bert_base:clipped` is the configs/bert_base.py of this checkout or wheel."""

import importlib.machinery
import importlib.util
import re
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

    A recipe that takes a model, `TAKES_MODEL = True` in its file, gets the value of init_from
    behind its variant, as `FILE:VARIANT,PATH`: it reads the model's configuration there.

    Raises:
      UserError: no recipe has that name, or two models are named.
    """
    model = _value_of(f"{FLAG}.init_from", arguments)
    found = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == FLAG and equals:
            argument = f"{FLAG}={_with_model(path_of(value), model)}"
        elif index and arguments[index - 1] == FLAG:
            argument = _with_model(path_of(argument), model)
        found.append(argument)
    return found


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value of a flag, as `--flag=value` or `--flag value`."""
    value = None
    for index, argument in enumerate(arguments):
        name, equals, rest = argument.partition("=")
        if name == flag:
            value = rest if equals else "".join(arguments[index + 1 : index + 2])
    return value


def _with_model(recipe: str, model: str | None) -> str:
    file, _, given = recipe.partition(":")
    if model is None or not takes_model(file):
        return recipe
    variant, comma, named = given.partition(",")
    if comma and named != model:
        raise UserError(
            f"{FLAG}.init_from={model} is not the model behind the comma of {FLAG}, {named}: name "
            "it once."
        )
    return f"{file}:{variant},{model}"


def takes_model(file: str) -> bool:
    """Whether a recipe's file says so, without running it."""
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, ValueError):
        return False  # whoever loads it says why
    return re.search(r"^TAKES_MODEL = True$", text, re.MULTILINE) is not None


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
