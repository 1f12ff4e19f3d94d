"""The weights of a folder or a file, whichever of the formats of PyTorch's world they are in."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantizable_flax.errors import UserError, nearest
from quantizable_flax.pretrained.opening import Tensors, check_file, reading
from quantizable_flax.pretrained.safetensors_file import read_safetensors
from quantizable_flax.pretrained.torch_file import read_torch

_INDEX = ".index.json"
# Of transformers and timm, the better first.
WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
READERS = {".safetensors": read_safetensors} | dict.fromkeys(
    (".bin", ".pt", ".pth", ".ckpt"), read_torch
)
# Others, in the order in which a folder is told to hold them.
_OTHERS = {
    "TensorFlow": ("*.h5", "*.ckpt.index", "saved_model.pb"),
    "Flax": ("*.msgpack",),
    "GGUF": ("*.gguf",),
    "ONNX": ("*.onnx", "onnx/*.onnx"),
    "OpenVINO": ("openvino*.xml", "openvino/*.xml"),
}


def read_weights(folder: Path) -> Tensors:
    """Returns the tensors of a model, name -> numpy array, each read when it is asked for.

    A model of many gigabytes needs room for those tensors alone that are kept. An array may be one
    that cannot be written to.

    Args:
      folder: of transformers or timm, with model.safetensors or pytorch_model.bin, whole or in
        shards, of which safetensors are preferred; or one file of weights (.safetensors, .bin, .pt,
        .pth, .ckpt), or the index of shards.

    Raises:
      UserError: no weights, or those of another framework; shards that are missing or do not hold
        what the index says; files that are damaged or ask to run something (`read_safetensors`,
        `read_torch`).
    """
    path = _find(folder) if os.path.isdir(folder) else folder
    return _read_shards(path) if path.name.endswith(_INDEX) else _read_file(path)


def _read_file(path: Path) -> Tensors:
    check_file(path)
    if path.suffix not in READERS:
        raise UserError(
            f"expected the folder of a model or a file of weights ({', '.join(READERS)}), found "
            f"{path}; name another one"
        )
    return READERS[path.suffix](path)


def _find(folder: Path) -> Path:
    """Returns the file of weights in a folder, or the index of its shards."""
    try:
        names = sorted(path.name for path in folder.iterdir())
        others = {
            kind: found[0]
            for kind, patterns in _OTHERS.items()
            if (found := [path for pattern in patterns for path in folder.glob(pattern)])
        }
    except OSError as error:
        raise UserError(
            f"expected to be able to look into the folder {folder}, found "
            f"'{error.strerror or error}'; correct its permissions"
        ) from None
    for name in WEIGHTS:
        if name in names:  # a link that leads nowhere, too, which is told then
            return folder / name
    if others:
        files = ", ".join(str(path.relative_to(folder)) for path in others.values())
        there = f"those of {' and '.join(others)} alone ({files})"
        advice = "fetch or save the model in one of those formats"
    else:
        there = f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}" or "no files"
        advice = "name the folder of a model, or its file of weights"
    raise UserError(
        f"expected weights in {folder} (model.safetensors or pytorch_model.bin, or shards of one "
        f"with their index), found {there}; {advice}"
    )


def _read_shards(index: Path) -> Tensors:
    """Returns the tensors of all shards that an index names."""
    places = _read_index(index)
    readers, homes = dict[str, Callable[[], np.ndarray]](), dict[str, str]()
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if not os.path.lexists(path):
            raise UserError(
                f"expected the shard {path}, which {index.name} names, found no such file; fetch "
                "the model again"
            )
        tensors = _read_file(path)
        lacking = [name for name, home in places.items() if home == shard and name not in tensors]
        if lacking:
            raise UserError(
                f"expected tensor {lacking[0]!r} in {path} by {index.name}, found it has none of "
                f"that name{nearest(lacking[0], tensors)}; fetch the model again"
            )
        for name in tensors:
            if name in homes:
                raise UserError(
                    f"expected tensor {name!r} in one shard of {index}, found it in {homes[name]} "
                    f"and {shard}; fetch the model again into an empty folder"
                )
            homes[name] = shard
        readers |= tensors.readers
    return Tensors(readers)


def _read_index(path: Path) -> dict[str, str]:
    """Returns tensor's name -> name of the shard in the same folder."""
    check_file(path)
    with reading(path, "a table weight_map of tensors and their shards"):
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not places:
            raise ValueError("an empty table")
        for name, shard in places.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{name!r} lies in {shard!r}, which is no name of a file here")
    return places
