"""Files in the format of safetensors, read tensor by tensor and written whole."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 by name from then on
import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.opening import Tensors, check_file, first_line, reading

_WHAT = "a whole file of safetensors"
_TYPES = {"bool", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def read_safetensors(path: Path) -> Tensors:
    """Returns the tensors of a file, which is mapped; each access copies one tensor out of it.

    Raises:
      UserError: no such file, one that is damaged, cut short or a pointer of Git LFS; on access, a
        type of numbers that numpy has no name for.
    """
    safe_open = _library().safe_open
    check_file(path)
    with reading(path, _WHAT):
        handle = safe_open(str(path), framework="np")
        names = handle.keys()
    return Tensors({name: functools.partial(_read, handle, path, name) for name in names})


def _read(handle: Any, path: Path, name: str) -> np.ndarray:
    with reading(path, f"a tensor of numbers {name!r}"):
        return handle.get_tensor(name)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file that transformers reads; under its name there is all of it or what was there.

    One array under several names (a tied head) is written once, under the first of them, as
    transformers does: whoever reads it ties them again.

    Args:
      path: the file, in a folder that exists.
      tensors: name -> array of any shape; bool, integers, float16, bfloat16, float32, float64.
      metadata: texts to write beside `format: pt`, without which transformers refuses a file.

    Raises:
      UserError: numbers of a type that the format does not have, or a file that cannot be written.
    """
    save_file = _library().numpy.save_file
    arrays = _once({name: np.asarray(tensor) for name, tensor in tensors.items()})
    for name, array in arrays.items():
        if array.dtype.name not in _TYPES:
            raise UserError(
                f"expected numbers of at most 64 bits in tensor {name!r}, to be written to {path}, "
                f"found {array.dtype}; convert it, or leave it out"
            )
    # Not ascontiguousarray, which makes vectors of scalars.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        with _complete(path) as temporary:
            save_file(arrays, temporary, metadata={"format": "pt"} | dict(metadata or {}))
    except Exception as error:  # the library has its own, also for a full disk
        raise UserError(
            f"expected to be able to write {path}, found '{first_line(error)}'; correct the path, "
            "or make room there"
        ) from None


def _once(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays without those that are one of the others under another name."""
    kept, seen = dict[str, np.ndarray](), set[tuple]()
    for name, array in arrays.items():
        place = (array.ctypes.data, array.shape, array.strides, array.dtype)
        if array.size and place in seen:
            continue
        seen.add(place)
        kept[name] = array
    return kept


@contextlib.contextmanager
def _complete(path: Path):
    """Gives a temporary path beside `path`, which takes its place if nothing is raised."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        usual = Path(folder) / "usual"  # the library gives a file to its owner alone
        usual.touch()
        shutil.copymode(usual, temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a crash of the system could leave holes in it
        os.replace(temporary, path)


def _library() -> Any:
    """Returns the package safetensors; raises UserError where it is not installed."""
    try:
        import safetensors.numpy  # only whoever reads weights of others needs it
    except ImportError:
        raise UserError(
            "expected the package safetensors for files of weights, found it not installed; run: "
            "pip install 'quantizable_flax[interop]'"
        ) from None
    return safetensors
