"""The images of the configured source, split into training and validation."""

from collections.abc import Callable
from typing import Protocol

from ml_collections import ConfigDict

from quantizable_flax.data.hub_library import HUB
from quantizable_flax.data.images.digits import open_digits
from quantizable_flax.data.images.files import FileDataset, expand
from quantizable_flax.data.images.hub import hub_dataset
from quantizable_flax.data.images.pool import Pool
from quantizable_flax.data.images.tfds import tfds_dataset
from quantizable_flax.data.kinds import images_have_labels
from quantizable_flax.data.paths import check_disjoint
from quantizable_flax.errors import UserError, nearest

_NAMES = ("auto", "embedded", "folder")
_TFDS = "tfds:"
_DATASETS: dict[str, Callable] = {_TFDS: tfds_dataset, HUB: hub_dataset}


class Dataset(Protocol):
    """Images to train on, and perhaps some to validate on."""

    has_validation: bool

    def train(self) -> Pool:
        """Returns the images that are not set aside for validation."""
        ...

    def validation(self) -> Pool:
        """Returns the images for validation, where `has_validation`."""
        ...


class _DigitDataset:
    has_validation = False
    train = staticmethod(open_digits)
    validation = staticmethod(open_digits)


def opener(config: ConfigDict) -> Callable[[], Dataset]:
    """Returns what opens the data that `config.data.source` names.

    Raises:
      UserError: an unknown source, or fields that contradict it.
    """
    data = config.data
    name = str(data.source)
    if name == "auto":
        name = "folder" if data.files else "embedded"
    prefix = next((p for p in _DATASETS if name.startswith(p) and len(name) > len(p)), None)
    if name not in _NAMES and prefix is None:
        raise UserError(
            f"expected data.source among {', '.join(_NAMES)}, {_TFDS}NAME and {HUB}NAME[,CONFIG], "
            f"found {name!r}{nearest(name, (*_NAMES, *_DATASETS))}; choose one of them"
        )
    if name != "folder" and data.files:
        raise UserError(
            f"expected data.files to be empty for data.source={name!r}, found {data.files!r}; "
            "leave one of them out"
        )
    labelled = images_have_labels(config)
    if prefix is not None:
        count = config.model.num_classes if labelled else None
        return lambda: _DATASETS[prefix](name[len(prefix) :], data, count)
    if name == "embedded":
        return _DigitDataset
    return lambda: _open_files(data, labelled)


def _open_files(data: ConfigDict, labelled: bool) -> FileDataset:
    if not data.files:
        raise UserError(
            "expected data.files for data.source='folder', found it empty; set it to folders "
            "or tars of images, or data.source to 'embedded'"
        )
    return FileDataset(data.files, "data.files", labelled=labelled)


def open_validation_files(data: ConfigDict, *, labelled: bool) -> Pool:
    """Returns the images of data.validation_files, with their classes or without.

    Raises:
      UserError: files that cannot be read, or that are also in data.files.
    """
    files = FileDataset(data.validation_files, "data.validation_files", labelled=labelled)
    if data.files:
        check_disjoint(expand(data.files, "data.files"), files.paths)
    return files.validation()
