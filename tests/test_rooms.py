"""Imports run one way through the rooms of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "quantizable_flax"
# A room may import those before it.
ORDER = (
    "errors",
    "quantization",
    "kernels",
    "nn",
    "models",
    "interop",
    "config",
    "ptq",
    "data",
    "pretrained",
    "onnx",
    "runtime",
    "checkpoint",
    "evaluation",
    "report",
    "training",
    "aot",
    "cli",
    "generate",
    "export",
    "inspect",
)
# Each library behind one door.
DOORS = {
    "aqt": {"quantization/aqt_backend.py"},
    "qwix": {"quantization/qwix_backend.py"},
    "tokenizers": {"data/text/subword.py"},
    "tensorflow_datasets": {"data/tfds_source.py"},
    "datasets": {"data/hub_library.py"},
    "plotly": {"report/plot.py"},
    "orbax": {"checkpoint/store.py"},
    "safetensors": {"pretrained/safetensors_file.py"},
    "huggingface_hub": {"pretrained/hub.py"},
    "onnx": {"onnx/graph.py"},
}


def imports():
    """Yields (path below the package, imported module) for every import statement."""
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = node.module or "."
                names = [f"{module}.{alias.name}" for alias in node.names]
                yield from ((name, n) for n in names)


IMPORTS = sorted(set(imports()))


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_every_room_has_its_place():
    assert {room(name) for name, _ in IMPORTS} <= {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    before = set(ORDER[: ORDER.index(name) + 1])
    wrong = [
        (file, module)
        for file, module in IMPORTS
        if room(file) == name
        and module.startswith("quantizable_flax.")
        and module.split(".")[1] not in before
    ]
    assert not wrong


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    assert {file for file, module in IMPORTS if module.split(".")[0] == library} == DOORS[library]


def test_the_data_stand_on_their_own():
    modules = {module for file, module in IMPORTS if room(file) == "data"}
    # Grain brings jax along where it is installed; the room must not ask for it.
    assert not {m.split(".")[0] for m in modules} & {"jax", "flax", "orbax", "tensorflow"}
    own = {module.split(".")[1] for module in modules if module.startswith("quantizable_flax")}
    assert own <= {"data", "errors"}
