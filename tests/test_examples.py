"""The programs of examples/ print what their docstrings say, and the figures are right."""

import os
import re
import subprocess
import sys

import pytest

from tests.programs import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def output(name: str) -> dict[str, list[float]]:
    """The numbers of each line that an example prints, by what stands before them."""
    # As people have it: optax promotes types, which tests of our own code forbid.
    env = {key: value for key, value in os.environ.items() if "_PROMOTION" not in key}
    command = [sys.executable, "-m", f"examples.{name}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        label, rest = re.fullmatch(r"(.+?)(?: {2,})(.*)", line).groups()
        found[label] = [float(x) for x in re.findall(r"(?<![\w.])-?\d[\d.]*(?:e[+-]\d+)?", rest)]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_says_how_it_is_run(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"python -m examples.{name}." in text.splitlines()[0]
    assert f"python -m examples.{name}\n" in (ROOT / "docs" / "loading.md").read_text()


def test_a_model_of_ones_own_learns_and_is_quantized():
    found = {name: numbers[0] for name, numbers in output("own_model").items()}
    fp, w8a8, w4a8 = (found[name] for name in ("fp", "w8a8", "w4a8"))
    assert 1.92 < fp < 2.3  # of 32 tokens, where one in ten cannot be known
    assert 0 < abs(w8a8 / fp - 1) < 0.01  # other numbers, but hardly worse ones
    assert fp < w4a8 < 1.05 * fp
    assert abs(w4a8 - fp) > abs(w8a8 - fp)
    assert 1 < found["max_inf_norm"] < 100
    assert 1 < found["avg_kurtosis"] < 20
    assert found["int8 differs"] < 1e-4


@pytest.mark.parametrize(("name", "own"), [("clipped_in_linen", "flax"), ("nnx_attention", "nnx")])
def test_clipped_softmax_in_the_attention_of_flax(name, own):
    found = output(name)
    for label in (own, "gamma 0"):
        difference, zeros, total = found[label]
        assert difference < 1e-6
        assert zeros == 0
    difference, zeros, _ = found["gamma -0.05"]
    assert difference > 0.01
    assert 0.1 * total < zeros < total  # some heads attend to something
    if name == "nnx_attention":
        share, gradient = found["gated"]
        assert share == pytest.approx(0.25, abs=0.01)
        assert gradient > 0
