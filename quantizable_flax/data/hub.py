"""Rows of datasets of the Hugging Face hub and of parquet files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantizable_flax.data.hub_library import library, opened
from quantizable_flax.data.task import Source
from quantizable_flax.errors import UserError, nearest

TEXT, IMAGE, CLASS, INTEGER = "text", "image", "classes", "integers"
# One row of a parquet may be a whole book: few at a time.
_PARQUET_ROWS = 16


def split_names(name: str) -> list[str]:
    """Returns the splits of a dataset: those of its own, "train" for one that was saved alone.

    `name` and the errors are those of `hub_library.opened`.
    """
    return list(opened(name).splits)


def columns(name: str, split: str) -> dict[str, str]:
    """Returns what each column holds: TEXT, IMAGE, CLASS, INTEGER or the name of another type.

    Raises UserError as `split_names`, and for a split that is not there.
    """
    return {key: _kind(feature) for key, feature in _split(name, split).features.items()}


def class_names(name: str, split: str, column: str) -> list[str] | None:
    """Returns the names of the classes of a column, None where it has none."""
    return getattr(_split(name, split).features[column], "names", None)


def open_split(name: str, split: str, only: Sequence[str]) -> Source:
    """Returns random access to the rows of a split, as dicts by column.

    Images stay the bytes that were stored, none where there is no image; a text that is missing is
    None. Rows are read from memory-mapped files when they are asked for; the source pickles as
    their names.

    Args:
      name: as `split_names` takes it.
      split: one of the dataset's own.
      only: the columns to read, all of them there.

    Raises:
      UserError: as `columns`, and for an image of a folder that is gone.
    """
    return _Rows(_split(name, split).select_columns(list(only)))


def describe_split(name: str, split: str) -> dict:
    """Returns what identifies the rows of a split, without reading them, for cache keys."""
    dataset = _split(name, split)
    # The library's own name for a state of a dataset, though it wears an underscore: of the hub, it
    # follows from the commit, the same on every machine; a saved folder keeps it wherever it lies;
    # of plain files, it follows from paths and times. What is public, as version, rows and bytes,
    # stays when rows change, and checksums are empty.
    fingerprint = [dataset._fingerprint, opened(name).stamp]
    return {"source": "hub", "fingerprint": fingerprint, "rows": len(dataset)}


def parquet_columns(path: Path) -> dict[str, str]:
    """Returns what each column of a parquet file holds, see `columns`.

    Raises OSError or ValueError for a file that is not one.
    """
    features = library().IterableDataset.from_parquet(str(path)).features
    return {key: _kind(feature) for key, feature in features.items()}


def parquet_class_names(path: Path, column: str) -> list[str] | None:
    """Returns the names of the classes of a column of a parquet file, see `class_names`."""
    features = library().IterableDataset.from_parquet(str(path)).features
    return getattr(features[column], "names", None)


def parquet_rows(path: Path, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields some columns of the rows of a parquet file, streamed.

    Raises OSError or ValueError for a file that is damaged.
    """
    # Streamed, nothing is written; mapped, all of it would be copied to the library's cache first.
    dataset = library().IterableDataset
    return iter(dataset.from_parquet(str(path), columns=list(only), batch_size=_PARQUET_ROWS))


class _Rows:
    """Rows of a dataset with encoded images."""

    def __init__(self, dataset: Any):
        images = [key for key, feature in dataset.features.items() if _kind(feature) == IMAGE]
        for key in images:
            dataset = dataset.cast_column(key, library().Image(decode=False))
        self._dataset, self._images = dataset, images

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._dataset[index]
        return {**row, **{key: _content(row[key]) for key in self._images}}


def _content(image: Mapping[str, Any] | None) -> bytes:
    """Returns the bytes of an image, which a dataset of image files has only the place of."""
    if image is None:
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    import fsspec  # comes with datasets; opens members of zip files, too

    try:
        with fsspec.open(image["path"], "rb") as stream:
            return stream.read()
    except OSError as error:
        raise UserError(
            f"expected to be able to read the image {image['path']} of a dataset, found "
            f"'{error.strerror or error}'; bring it back, or take the dataset anew"
        ) from None


def _kind(feature: Any) -> str:
    hf = library()
    if isinstance(feature, hf.Image):
        return IMAGE
    if isinstance(feature, hf.ClassLabel):
        return CLASS
    dtype = getattr(feature, "dtype", None) if isinstance(feature, hf.Value) else None
    if dtype in ("string", "large_string", "string_view"):
        return TEXT
    return INTEGER if dtype and "int" in dtype else dtype or type(feature).__name__


def _split(name: str, split: str) -> Any:
    splits = opened(name).splits
    if split not in splits:
        raise UserError(
            f"expected the split {split!r} in the dataset {name}, found "
            f"{', '.join(splits) or 'none'}{nearest(split, splits)}; choose another dataset"
        )
    return splits[split]
