"""docs/loading.md reads a checkpoint by Orbax alone, whatever devices wrote it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from quantizable_flax.checkpoint import store
from tests.programs import ROOT

WRITTEN = "/absolute/path/runs/clipped/checkpoints/2500/params"
SAVE = """
import sys
assert "flax" not in sys.modules
assert len(jax.devices()) == 1
import numpy
numpy.savez(sys.argv[1], kernel=params["dense"]["kernel"], bias=params["dense"]["bias"])
"""


def test_what_two_devices_wrote_is_read_on_one(tmp_path):
    devices = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    kernel = jax.random.normal(jax.random.key(0), (4, 3))
    bias = jnp.arange(3.0)
    split, whole = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = {
        "dense": {"kernel": jax.device_put(kernel, split), "bias": jax.device_put(bias, whole)}
    }
    store.save_params(epath.Path(tmp_path), params, store.Notes({}, {}, {}, {"step": 7}))
    (folder,) = Path(tmp_path).glob("checkpoints/*/params")

    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "docs" / "loading.md").read_text())
    (block,) = (block for block in blocks if "import orbax" in block)
    assert WRITTEN in block
    program = block.replace(WRITTEN, str(folder)) + SAVE
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "found.npz")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["kernel"], kernel)
    np.testing.assert_array_equal(found["bias"], bias)
