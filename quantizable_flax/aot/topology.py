"""Devices of a TPU slice that is not there, for compilation ahead of time."""

import importlib.util
import os
import re
from typing import Any

import jax

from quantizable_flax.errors import UserError
from quantizable_flax.runtime.chips import CHIPS, Chip

EXAMPLES = "v4:2x2x4, v5e:2x2, v5e:16x16, v5p:2x2x2, v6e:4x4"
TPUS = {chip.name: chip for chip in CHIPS if chip.device_kinds[0].startswith("TPU")}
# libtpu asks the machine that it runs on, which here is none of a slice.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # two compilations side by side touch no device
}


def prepare() -> None:
    """Sets this process up for compiling without an accelerator; before any array is made.

    Raises:
      UserError: libtpu, which holds the compiler, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "--aot needs the TPU compiler of libtpu, which is not installed: "
            'pip install libtpu, or pip install "quantizable_flax[aot]".'
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")


def chip_of_topology(name: str) -> Chip:
    """Returns the chip of a topology name as `v5e:16x16`.

    Raises:
      UserError: not such a name, or an unknown chip.
    """
    match = re.fullmatch(r"(\w+):\d+(x\d+)*", name)
    if match is None or match[1] not in TPUS:
        raise UserError(
            f"--aot takes a chip among {', '.join(TPUS)} and the size of its slice, as "
            f"{EXAMPLES}, found {name!r}."
        )
    return TPUS[match[1]]


def devices_of(name: str) -> list[jax.Device]:
    """Returns the devices of the slice, one for each chip.

    Raises:
      UserError: as `chip_of_topology`, or a slice that libtpu refuses.
    """
    from jax.experimental import topologies

    chip = chip_of_topology(name)
    size = name.partition(":")[2]
    options: dict[str, Any] = {}
    if chip.name == "v4":  # a chip is two devices otherwise
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    elif size == "1x1":
        options = {"chips_per_host_bounds": (1, 1, 1)}
    if options:
        options["num_slices"] = 1
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error).splitlines()[0]
        raise UserError(
            f"libtpu has no slice {name}: {reason.rstrip('.')}; take one as {EXAMPLES}."
        ) from error
    return list(topology.devices)
