"""Datasets that TensorFlow Datasets has built on disk, read as array_record, without TensorFlow."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from quantizable_flax.data.task import Source
from quantizable_flax.errors import UserError, nearest

_FORMAT = "array_record"
_NEEDS = "with tensorflow, apache-beam and mlcroissant installed"  # all at import of its commands
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def open_split(
    name: str,
    split: str,
    data_dir: str | None,
    *,
    undecoded: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Source:
    """Returns random access to the examples of a split, as dicts by feature.

    Args:
      name: as TFDS writes it: `lm1b`, `wiki40b/en`, `wiki40b/en:1.3.0`.
      split: one of the dataset's own, or a part of one such as `train[:10%]`.
      data_dir: where TFDS built it; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      undecoded: features, such as images, that stay the bytes that were stored.
      only: the features to read; all of them where empty.

    Raises:
      UserError: a dataset that is not there or not as array_record, or no such split or feature.
    """
    builder = _builder(name, data_dir)
    features = dict(builder.info.features)
    for key in (*undecoded, *only):
        _check_feature(features, key, name)
    _check_format(builder, name)
    _check_shards(builder, name, split)
    records = builder.as_data_source(split, file_format=_FORMAT).data_source
    wanted = {key: features[key] for key in only} or features
    return _Split(records, wanted, tuple(undecoded))


def feature_names(name: str, data_dir: str | None) -> list[str]:
    """Returns the features of an example, sorted."""
    return sorted(_builder(name, data_dir).info.features)


def split_names(name: str, data_dir: str | None) -> list[str]:
    """Returns the splits of a dataset, as it lists them."""
    return list(_builder(name, data_dir).info.splits)


def class_names(name: str, data_dir: str | None, label_key: str) -> list[str] | None:
    """Returns the names of the classes of a label, None where it has none.

    Raises:
      UserError: as `open_split`, for a feature that is not there.
    """
    features = _builder(name, data_dir).info.features
    _check_feature(features, label_key, name)
    return getattr(features[label_key], "names", None)


def describe_split(name: str, split: str, data_dir: str | None) -> dict:
    """Returns what identifies the examples of a split, without reading them, for cache keys."""
    info = _builder(name, data_dir).info
    described = _split_info(info, name, split)
    return {
        "source": "tfds",
        "name": info.name,
        "version": str(info.version),
        "config": info.config_name,
        "split": split,
        "examples": described.num_examples,
        "bytes": int(described.num_bytes),
    }


class _Split:
    """Records of array_record files, decoded one by one; pickles as the paths of the files."""

    def __init__(self, records: Any, features: dict[str, Any], undecoded: tuple[str, ...]):
        tfds = _library()
        self._records = records
        self._features = tfds.features.FeaturesDict(features)
        self._decoders = {key: tfds.decode.SkipDecoding() for key in undecoded}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)


def _library() -> Any:
    import tensorflow_datasets  # Slow, and only some runs need it.

    return tensorflow_datasets


@functools.cache
def _builder(name: str, data_dir: str | None) -> Any:
    folder = _version_folder(name, data_dir)
    try:
        return _library().builder_from_directory(folder)
    except Exception as error:  # Damaged metadata: whatever the parsers raise.
        raise UserError(
            f"expected a TFDS dataset in {folder}, found metadata that cannot be read "
            f"({_first_line(error)}); build it again: {_build_command(name, data_dir)}"
        ) from None


def _version_folder(name: str, data_dir: str | None) -> epath.Path:
    """Returns the folder of the version asked for, or of the newest."""
    plain, _, version = name.partition(":")
    parts = plain.split("/")
    if len(parts) == 3 and _VERSION.fullmatch(parts[2]) and not version:
        version = parts.pop()
    if not 1 <= len(parts) <= 2 or not all(re.fullmatch(r"[\w.+-]+", part) for part in parts):
        raise UserError(
            "expected a TFDS dataset such as lm1b, wiki40b/en or wiki40b/en:1.3.0, "
            f"found {name!r}; correct the name"
        )
    root = _root(data_dir)
    folder = root.joinpath(*parts)
    if len(parts) == 1 and not _versions(folder):
        folder = _default_config(folder)
    versions = _versions(folder)
    if not versions:
        raise UserError(_not_there(name, data_dir, root, parts))
    if version and version not in versions:
        raise UserError(
            f"expected version {version} of the TFDS dataset {folder.relative_to(root)} in {root}, "
            f"found {', '.join(versions)}; ask for one of these or run: "
            f"{_build_command(name, data_dir)}"
        )
    return folder / (version or versions[-1])


def _root(data_dir: str | None) -> epath.Path:
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return epath.Path(data_dir or default).expanduser()


def _children(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _versions(folder: epath.Path) -> list[str]:
    """Returns the built versions in a folder, oldest first."""
    found = [name for name in _children(folder) if _VERSION.fullmatch(name)]
    built = [name for name in found if (folder / name / "dataset_info.json").exists()]
    return sorted(built, key=lambda name: [int(part) for part in name.split(".")])


def _default_config(folder: epath.Path) -> epath.Path:
    """Returns the folder of the only configuration that is built, or `folder` itself."""
    configs = [name for name in _children(folder) if _versions(folder / name)]
    return folder / configs[0] if len(configs) == 1 else folder


def _not_there(name: str, data_dir: str | None, root: epath.Path, parts: list[str]) -> str:
    """Returns the message for a dataset that is not built."""
    configs = [child for child in _children(root / parts[0]) if _versions(root / parts[0] / child)]
    if configs:
        wanted = parts[1] if len(parts) == 2 else ""
        return (
            f"expected a configuration of the TFDS dataset {parts[0]} that is built in {root}, "
            f"found {name!r} and there {', '.join(configs)}{nearest(wanted, configs)}; name one "
            f"as {parts[0]}/{configs[0]} or run, {_NEEDS}: "
            f"{_build_command(name, data_dir)}"
        )
    others = [child for child in _children(root) if not child.startswith((".", "downloads"))]
    return (
        f"expected the TFDS dataset {name} in {root}, found "
        f"{', '.join(others[:10]) or 'no dataset'} there{nearest(parts[0], others)}; build it, "
        f"{_NEEDS}: {_build_command(name, data_dir)}"
    )


def _build_command(name: str, data_dir: str | None) -> str:
    return f"tfds build {name} --data_dir={_root(data_dir)} --file_format={_FORMAT}"


def _check_feature(features: Mapping[str, Any], key: str, name: str) -> None:
    if key not in features:
        raise UserError(
            f"expected the feature {key!r} in the TFDS dataset {name}, found "
            f"{', '.join(sorted(features))}{nearest(key, features)}; name one of these"
        )


def _check_format(builder: Any, name: str) -> None:
    found = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if _FORMAT not in found:
        raise UserError(
            f"expected the TFDS dataset {name} as {_FORMAT}, found only {', '.join(found)} in "
            f"{builder.data_dir}; convert it, {_NEEDS}: "
            f"tfds convert_format --dataset_version_dir={builder.data_dir} "
            f"--out_file_format={_FORMAT}"
        )


def _split_info(info: Any, name: str, split: str) -> Any:
    try:
        return info.splits[split]
    except (ValueError, KeyError):
        names = list(info.splits)
        raise UserError(
            f"expected a split of the TFDS dataset {name}, found {split!r}"
            f"{nearest(split, names)}; it has {', '.join(names)}"
        ) from None


def _check_shards(builder: Any, name: str, split: str) -> None:
    """Raises UserError for files that the metadata promise and that are gone."""
    described = _split_info(builder.info, name, split)
    present = set(_children(epath.Path(builder.data_dir)))
    names = [epath.Path(file.filename).name for file in described.file_instructions]
    suffix = f".{builder.info.file_format.value}-"
    missing = [n for n in (x.replace(suffix, f".{_FORMAT}-") for x in names) if n not in present]
    if missing:
        raise UserError(
            f"expected all files of the {split} split of the TFDS dataset {name} in "
            f"{builder.data_dir}, found {len(missing)} of {len(names)} missing, {missing[0]} for "
            "one; build or copy it again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
