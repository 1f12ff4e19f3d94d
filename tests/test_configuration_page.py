"""docs/configuration.md: it is what the keys say of themselves, and they all say something."""

import ast
import dataclasses
import importlib
import re

import pytest

from quantizable_flax.config import default_config, reference
from quantizable_flax.config.defaults import FAMILIES, family_keys
from quantizable_flax.config.keys import Key, derived, flattened, meaning, to_config
from tests.programs import ROOT, run
from tests.test_config import leaves

PAGE = ROOT / "docs" / "configuration.md"
KEYS = {family: [path for path, _ in leaves(default_config(family))] for family in FAMILIES}
EVERY = {path for paths in KEYS.values() for path in paths}


def test_the_page_is_what_the_command_prints():
    done = run("quantizable_flax.config.reference")
    assert done.returncode == 0, done.stderr
    assert PAGE.read_text() == done.stdout, "docs/configuration.md is stale: run `make docs`"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_a_meaning(family):
    meanings = {path: key.meaning for path, key in flattened(family_keys(family))}
    assert not [path for path, text in meanings.items() if not re.search(r"\w", text)]
    assert sorted(meanings) == sorted(KEYS[family])


def test_each_family_finds_its_keys_on_the_page():
    shared, *own = re.split(r"^## Family `(\w+)`$", PAGE.read_text(), flags=re.MULTILINE)
    assert own[::2] == list(FAMILIES)
    for family, text in zip(own[::2], own[1::2], strict=True):
        found = re.findall(r"^\| `([\w.]+)` \|", shared + text, re.MULTILINE)
        assert sorted(found) == sorted(KEYS[family])


def test_keys_named_in_a_meaning_exist():
    groups = {path.split(".")[0] for path in EVERY if "." in path}
    texts = [key.meaning for family in FAMILIES for _, key in flattened(family_keys(family))]
    named = {
        word
        for text in texts
        for word in re.findall(r"(?<![\w.])\w+(?:\.\w+)+", text)
        if word.split(".")[0] in groups and not word.endswith(".py")
    }
    assert named
    assert named <= EVERY


def choices():
    """(key, its choices) for every `check_choice("KEY", ..., CHOICES)` in the package."""
    for path in sorted((ROOT / "quantizable_flax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_choice":
                key, _, valid = node.args
                if isinstance(key, ast.Constant) and key.value in EVERY:
                    module = path.relative_to(ROOT).with_suffix("")
                    module = importlib.import_module(".".join(module.parts))
                    yield key.value, tuple(getattr(module, valid.id))


CHOICES = dict(choices())


@pytest.mark.parametrize("key", sorted(CHOICES.keys() - {"model.name"}))
def test_meanings_name_all_choices(key):
    row = re.search(rf"^\| `{re.escape(key)}` \|.*", PAGE.read_text(), re.MULTILINE)[0]
    _, _, kind, text = row.strip("| ").split(" | ")
    assert kind == "str"
    assert [choice for choice in CHOICES[key] if f"`{choice}`" not in text] == []


def test_choices_are_found():
    assert len(CHOICES) >= 8


@dataclasses.dataclass
class Parent:
    """Sizes.

    Attributes:
      width: of a layer.
      low, high: bounds, which
        take two lines.
    """

    width: int = 1
    low: float | None = None
    high: float = 2.0


@dataclasses.dataclass
class Child(Parent):
    """More sizes.

    Attributes:
      width: of another layer: "wide".

    Raises:
      depth: no attribute.
    """

    depth: int = 3


def function(size: int = 4):
    """Does something.

    Args:
      size: how much of it.

    Returns:
      other: nothing.
    """


def test_meanings_come_from_where_a_name_is_documented():
    assert meaning(Child, "width") == 'of another layer: "wide"'
    assert meaning(Child, "low") == meaning(Child, "high") == "bounds, which take two lines"
    assert meaning(Child, "depth") == ""
    assert meaning(function, "size") == "how much of it"
    assert meaning(function, "other") == ""
    keys = derived(Parent, ["low", "high"], prefix="p_")
    assert keys["p_low"] == Key(None, "bounds, which take two lines", float)
    assert keys["p_high"].optional is None
    assert to_config({"group": keys}).to_dict() == {"group": {"p_low": None, "p_high": 2.0}}


def test_words_to_type_are_code():
    known = {"train.steps", "optimizer.decay_steps"}
    marked = reference._marked('"a b" for train.steps, not train.step; `x "y"`|train.steps', known)
    assert marked == '`a b` for `train.steps`, not train.step; `x "y"`\\|`train.steps`'
