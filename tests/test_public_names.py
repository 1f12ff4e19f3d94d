"""The public names: all of them are there, and they cost no more imports than they need."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import flax.linen as nn
import pytest

import quantizable_flax as qf

ROOT = Path(__file__).parents[1]
# What jax, flax, numpy and ml_collections bring is free.
PROGRAM = """
import sys
import flax.linen, jax, ml_collections, numpy
before = set(sys.modules)
import quantizable_flax as qf
{uses}
known = {{name.split(".")[0] for name in before}} | {{"quantizable_flax", *sys.stdlib_module_names}}
print(*sorted({{name.split(".")[0] for name in sys.modules}} - known))
"""


def imported(*uses: str) -> set[str]:
    """Libraries that a new process imports for the package and these lines."""
    program = PROGRAM.format(uses="\n".join(uses))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_models_and_attention_need_jax_and_flax_alone():
    names = (
        "MultiHeadAttention GateConfig build_model default_config QuantSpec calibrate with_quant"
    )
    uses = [f"qf.{name}" for name in names.split()]
    attention = "qf.attention_fn('clipped', gamma=-0.1)(*[jax.numpy.ones((1, 2, 1, 4))] * 3)"
    built = "qf.build_model(qf.default_config('opt')).example_batch()"
    assert imported(*uses, attention, built) == set()


def test_a_library_comes_when_it_is_used():
    assert "aqt" in imported("import quantizable_flax.quantization.aqt_backend")
    # The one is never needed for the other.
    uses = "from quantizable_flax.quantization import grid, tensor; from jax.numpy import ones"
    rounding = "tensor.fake_quantize(ones(3), grid.symmetric_grid(-ones(()), ones(()), 8){})"
    assert imported(uses, rounding.format("")) & {"aqt", "qwix"} == {"aqt"}
    other = imported(uses, rounding.format(", library='qwix'"))
    assert other & {"aqt", "qwix"} == {"qwix"}
    loading = imported("qf.load")
    assert "orbax" in loading
    assert not loading & {"aqt", "qwix", "grain", "optax", "tokenizers", "tqdm", "PIL", "sklearn"}


def words(docstring: str) -> set[str]:
    """Of a docstring, and of those whose arguments it shares."""
    others = [getattr(qf, name).__doc__ for name in re.findall(r"those of `(\w+)`", docstring)]
    return set(re.findall(r"\w+", " ".join([docstring, *others])))


@pytest.mark.parametrize("name", qf.__all__)
def test_names_say_what_they_take_and_return(name):
    assert name in dir(qf)
    value = getattr(qf, name)
    docstring = vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__
    assert docstring
    assert not docstring.startswith(f"{name}(")  # what dataclasses say of themselves
    if not inspect.isclass(value):
        assert set(inspect.signature(value).parameters) <= words(docstring)
        assert {"Returns", "returns"} & words(docstring)
    elif dataclasses.is_dataclass(value):
        of_flax = {"parent", "name"} if issubclass(value, nn.Module) else set()
        fields = {field.name for field in dataclasses.fields(value)} - of_flax
        assert fields <= words(docstring.partition("Attributes:")[2])


def reference(folder, *lines: str) -> subprocess.CompletedProcess:
    """Writes the pages of the public names after some lines of Python."""
    pytest.importorskip("pdoc")
    path = str(ROOT / "docs" / "api" / "build.py")
    program = [*lines, "import runpy, sys", f"sys.argv[1:] = [{str(folder)!r}]"]
    program.append(f"runpy.run_path({path!r}, run_name='__main__')")
    command = [sys.executable, "-c", "\n".join(program)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_reference_has_each_name_with_its_docstring_and_arguments(tmp_path):
    done = reference(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantizable_flax.html" in (tmp_path / "index.html").read_text()
    page = (tmp_path / "quantizable_flax.html").read_text()
    for name in qf.__all__:
        (section,) = re.findall(rf'(?s)<section id="{name}">(.*?)</section>', page)
        assert f'href="#{name}"' in section
        assert 'class="docstring"' in section
        if name != "UserError":
            assert 'class="param"' in section


@pytest.mark.parametrize("what", ["load", "QuantSpec"])
def test_the_reference_needs_docstrings(tmp_path, what):
    done = reference(tmp_path / "new", "import quantizable_flax as qf", f"qf.{what}.__doc__ = None")
    assert done.returncode == 1
    assert done.stderr.strip() == f"no docstring: {what}"
    assert not (tmp_path / "new").exists()


def test_the_reference_takes_warnings_for_errors(tmp_path):
    broken = "import quantizable_flax as qf; qf.load.__annotations__['path'] = 'no such type'"
    done = reference(tmp_path / "new", broken)
    assert done.returncode == 1
    assert "no such type" in done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'soft_max'"):
        _ = qf.soft_max


def test_the_wheel_and_its_extras_ask_for_what_the_requirements_name():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    names = everything.partition("[")[2].rstrip("]").split(",")
    assert {*project["dependencies"], *(x for name in names for x in extras[name])} == set(lines)
    tools = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert set(extras["dev"]) == set(tools) - {"-r requirements.txt"}


def test_console_scripts_are_functions():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"quantizable-flax-train", "quantizable-flax-export"} < scripts.keys()
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
