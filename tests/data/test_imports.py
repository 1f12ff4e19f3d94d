"""Who imports what: the data package stands on its own, each library has one door."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "quantizable_flax" / "data"


def imports():
    """Yields (file name, imported module) for every import statement of the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path.name, node.module or "."


def test_the_package_itself_imports_no_model_code():
    # Grain brings jax along where it is installed; the package must not ask for it.
    modules = {module for _, module in imports()}
    assert not {m.split(".")[0] for m in modules} & {"jax", "flax", "orbax", "tensorflow"}
    own = {module.split(".")[1] for module in modules if module.startswith("quantizable_flax")}
    assert own <= {"data", "errors"}


def test_each_library_has_one_door():
    doors = {"tokenizers": {"subword.py"}, "tensorflow_datasets": {"tfds_source.py"}}
    for library, files in doors.items():
        assert {name for name, module in imports() if module.split(".")[0] == library} == files
