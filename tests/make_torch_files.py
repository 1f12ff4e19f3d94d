"""Writes the small files of torch.save among the goldens: python tests/make_torch_files.py.

By hand, where PyTorch is installed. What the files hold is stated once more, in numpy, in
tests/pretrained/torch_files.py.
"""

import os
from collections import OrderedDict
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "goldens"


def state_dict(zipped: bool = True) -> OrderedDict:
    """Views of one storage, every type of numbers, odd shapes, and a value that is no tensor."""
    base = torch.arange(24.0).reshape(4, 6) / 8
    state = OrderedDict(
        whole=base,
        transposed=base.T,
        row=base[2],
        column=base[:, 1],
        block=base[1:3, 2:5],
        tied=base,
        parameter=torch.nn.Parameter(torch.full((2,), 0.25)),
        expanded=torch.tensor([7.0]).expand(2, 3),
        empty=torch.zeros(0, 3),
        half=torch.arange(5).half() / 2,
        bfloat16=torch.arange(5).bfloat16() - 2.5,
        double=torch.tensor(-3.5, dtype=torch.float64),
        long=torch.arange(3) - 1,
        int=torch.arange(3, dtype=torch.int32) - 2,
        byte=torch.tensor([0, 255], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        steps=3,
    )
    if zipped:  # the old format writes newer types so that PyTorch does not read them
        state["unsigned"] = torch.tensor([0, 65535], dtype=torch.uint16)
    state._metadata = OrderedDict({"": {"version": 1}})  # as state_dict() leaves it
    return state


class Payload:
    """Runs a command in whoever unpickles it."""

    def __reduce__(self):
        return os.system, ("touch payload_was_run",)


def main() -> None:
    """Writes all files."""
    small = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    lightning = {
        "epoch": 3,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": OrderedDict(small),
        "optimizer_states": [moments],
    }
    malicious = {"weight": torch.ones(2), "payload": Payload()}
    old = {"_use_new_zipfile_serialization": False}
    torch.save(state_dict(), FOLDER / "torch_zip.bin")
    torch.save(state_dict(zipped=False), FOLDER / "torch_legacy.bin", **old)
    torch.save(state_dict(), FOLDER / "torch_protocol4.bin", pickle_protocol=4)
    torch.save(lightning, FOLDER / "torch_lightning.bin", **old)
    torch.save({"model": small, "args": None}, FOLDER / "torch_deit.bin")
    torch.save(malicious, FOLDER / "torch_malicious_zip.bin")
    torch.save(malicious, FOLDER / "torch_malicious_legacy.bin", **old)


if __name__ == "__main__":
    main()
