"""Results are printed on any stream, and files hold them in UTF-8 whatever the locale."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantizable_flax.runtime.terminal import encodable

ROOT = Path(__file__).parents[1]
# As a batch system or a container without a locale sets it.
ASCII = {
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}
TABLE = """
import sys
from quantizable_flax.cli import program
from quantizable_flax.evaluation import tables
row = {"name": "gr\\xf6\\xdfe", "model": "bert", "attention": "vanilla", "metric": "perplexity"}
row |= {"fp": 4.5, "max_inf_norm": 1.0, "avg_kurtosis": 3.0, "steps": 80, "w8a8": 4.6}
row |= {"w8a8_std": 0.01}
def main(arguments):
    tables.print_table([row], ["w8a8"])
    tables.write_text(tables.markdown([row], ["w8a8"]), arguments[1])
    tables.write_json([row], arguments[2])
program.run(main)
"""
WORDS = """
from quantizable_flax.cli import program
from quantizable_flax.runtime import terminal
def main(arguments):
    with terminal.printing():
        print("word \\xb1 " * 100_000)
program.run(main)
"""


def start(program: str, *arguments, stdout=subprocess.PIPE, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_table_on_an_ascii_terminal(tmp_path):
    process = start(TABLE, tmp_path / "a.md", tmp_path / "a.json", **ASCII)
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    lines = out.decode("ascii").splitlines()
    assert "4.600 +- 0.010" in lines[3]
    assert "gr\\xf6\\xdfe" in lines[3]
    assert len({len(line) for line in lines}) == 1  # columns stay aligned
    assert "| größe | vanilla |" in (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "4.600 ± 0.010" in (tmp_path / "a.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes())[0]["name"] == "größe"


def test_reader_who_leaves_is_no_mistake():
    process = start(WORDS, PYTHONIOENCODING="ascii")
    assert process.stdout.read(7) == b"word +-"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = start(WORDS, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.decode().startswith("error: stdout cannot be written (No space left on device)")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "4.5 +- 0.1 gr\\xf6\\xdfe \\u4f60\\U0001f600 \\udcff"),
        ("latin-1", "4.5 ± 0.1 größe \\u4f60\\U0001f600 \\udcff"),
        ("utf-8", "4.5 ± 0.1 größe 你😀 \\udcff"),  # undecodable bytes of a file's name
    ],
)
def test_each_stream_gets_what_it_can_show(encoding, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert encodable("4.5 ± 0.1 größe 你😀 \udcff", stream) == expected
