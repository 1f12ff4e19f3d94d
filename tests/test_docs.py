"""What the documentation tells people to type exists: flags, keys, recipes, variants, targets."""

import functools
import importlib
import re
import shlex
import subprocess

import pytest
import yaml

from quantizable_flax.config import default_config
from quantizable_flax.config.defaults import FAMILIES
from tests.programs import ROOT, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPERATORS = {";", "&&", "||", "|", "&", "(", ")", ";;", ">", "<", ">&"}


def blocks(language: str) -> list[str]:
    return [
        text for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language
    ]


def one_line(block: str) -> str:
    """The block without comments and continuations, `;` for every end of a line outside quotes."""
    quoted, quote = [], ""
    for character in re.sub(r"(?m)(^|\s)#.*$", r"\1", block.replace("\\\n", " ")):
        if character in "'\"":
            quote = {"": character, character: ""}.get(quote, quote)
        quoted.append(" ; " if character == "\n" and not quote else character)
    return "".join(quoted)


def commands(block: str) -> list[list[str]]:
    """Every simple command of a block, those inside `--command=...` of another one included."""
    lexer = shlex.shlex(one_line(block), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in OPERATORS:
            found.append([])
            continue
        found[-1].append(word)
        if word.startswith("--command="):
            found[-1:-1] = commands(word.removeprefix("--command="))
    return [command for command in found if command]


def program(command: list[str]) -> tuple[str, list[str]] | None:
    """(what of this project a command runs, its arguments), or None."""
    for index, word in enumerate(command):
        if word.endswith(("train.py", "eval.py")):
            return word, command[index + 1 :]
        if word == "-m" and command[index + 1].startswith(("quantizable_flax", "benchmarks")):
            return f"-m {command[index + 1]}", command[index + 2 :]
    return None


CALLS = [
    call
    for block in blocks("bash")
    for command in commands(block)
    if (call := program(command)) is not None
]


@functools.cache
def flags_of(name: str) -> set[str]:
    """Flags that a program knows, from its own help."""
    for option in ("--helpfull", "--help"):  # absl, argparse
        done = run(name.removeprefix("-m "), option)
        found = set(re.findall(r"--(?:\[no\])?(\w+)", done.stdout))
        if found:
            return found
    raise AssertionError(f"{name} tells no flags")


@functools.cache
def recipe(text: str) -> list:
    """The configurations that a recipe may give: of any family where it takes a finished model."""
    file, _, variant = text.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    if getattr(module, "TAKES_MODEL", False):
        assert variant.partition(",")[0] in module.VARIANTS
        return [default_config(family) for family in FAMILIES]
    return [module.get_config(variant) if variant else module.get_config()]


def knows(config, path: str) -> bool:
    for key in path.split("."):
        if key not in config:
            return False
        config = config.get(key)
    return True


def keyed(name: str, arguments: list[str]) -> list[tuple[str, list]]:
    """(key, configurations of which one must have it) for every override in the arguments."""
    recipes = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    configs = [config for r in recipes for config in recipe(r)]
    configs = configs or [default_config(family) for family in FAMILIES]
    keys = [a.split("=")[0] for a in arguments if a.startswith(("--config.", "--config.quant."))]
    return [(key[2:].removeprefix("config."), configs) for key in keys]


def test_there_is_something_to_check():
    modules = {f"-m quantizable_flax.{name}" for name in ("generate", "export")}
    assert {name for name, _ in CALLS} >= {"train.py", "eval.py", *modules}
    assert len(CALLS) >= 12
    assert sum(len(keyed(*call)) for call in CALLS) >= 15


def test_commands_are_taken_apart():
    block = """a=1 python train.py --x='b c' \\
  --y  # no
make demo; ssh --command='
  cd d
  e f && g' | tee h
"""
    assert commands(block) == [
        ["a=1", "python", "train.py", "--x=b c", "--y"],
        ["make", "demo"],
        ["cd", "d"],
        ["e", "f"],
        ["g"],
        ["ssh", "--command=\n  cd d\n  e f && g"],
        ["tee", "h"],
    ]


@pytest.mark.parametrize("block", blocks("bash"))
def test_blocks_are_bash(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("yaml"))
def test_blocks_are_yaml(block):
    assert all(document["kind"] for document in yaml.safe_load_all(block))


@pytest.mark.parametrize("block", blocks("python"))
def test_blocks_are_python(block):
    compile(block, "documentation", "exec")


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_flags_exist(name):
    given = {
        argument[2:].split("=")[0]
        for called, arguments in CALLS
        if called == name
        for argument in arguments
        if argument.startswith("--") and not argument.startswith(("--config.", "--config.quant."))
    }
    assert given <= flags_of(name) | {"config"}


def test_keys_and_recipes_exist():
    unknown = [
        (name, key)
        for name, arguments in CALLS
        for key, configs in keyed(name, arguments)
        if not any(knows(config, key) for config in configs)
    ]
    assert not unknown


def test_recipes_named_in_text_exist():
    named = {file for page in PAGES for file in re.findall(r"configs/(\w+)\.py", page.read_text())}
    assert named
    assert all((ROOT / "configs" / f"{file}.py").exists() for file in named - {"FILE"})


def test_make_targets_exist():
    lines = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for line in lines for target in line.split()}
    typed = {
        word
        for block in blocks("bash")
        for command in commands(block)
        if command[0] == "make"
        for word in command[1:]
    }
    inline = {
        word
        for page in PAGES
        for line in re.findall(r"`make ([\w -]+)`", page.read_text())
        for word in line.replace("make ", "").split()
    }
    assert {"demo", "test"} <= typed | inline <= targets


def test_keys_named_in_text_exist():
    configs = [default_config(family) for family in FAMILIES]
    groups = {key for config in configs for key, value in config.items() if hasattr(value, "keys")}
    key = re.compile(rf"`(?:--)?(?:config\.)?((?:{'|'.join(groups)})(?:\.[a-z]\w*)+)")
    files = (".py", ".sh", ".json", ".stablehlo", ".onnx", ".onnx.data")
    named = {
        (page.name, found)
        for page in PAGES
        for found in key.findall(page.read_text())
        if not found.endswith(files)
    }
    assert len(named) > 150  # one page has all of them
    assert not [
        (page, path) for page, path in named if not any(knows(config, path) for config in configs)
    ]
