"""The public names: all of them are there, and they cost no more imports than they need."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

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
    loading = imported("qf.load")
    assert "orbax" in loading
    assert not loading & {"aqt", "grain", "optax", "tokenizers", "tqdm", "PIL", "sklearn"}


@pytest.mark.parametrize("name", qf.__all__)
def test_names_are_there_and_documented(name):
    assert getattr(qf, name).__doc__
    assert name in dir(qf)


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


def test_console_scripts_are_functions():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"quantizable-flax-train", "quantizable-flax-export"} < scripts.keys()
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
