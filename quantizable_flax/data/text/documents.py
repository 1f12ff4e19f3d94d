"""Documents of the configured source, split into training and validation."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.data.hub_library import HUB
from quantizable_flax.data.paths import check_disjoint
from quantizable_flax.data.splits import VALIDATION_SPLITS, position, validation_fraction
from quantizable_flax.data.task import SPLITS
from quantizable_flax.data.text import hub as hub_text
from quantizable_flax.data.text import tfds as tfds_text
from quantizable_flax.data.text.corpora import EMBEDDED, FILES, TFDS, corpora
from quantizable_flax.data.text.embedded import embedded_description, embedded_documents
from quantizable_flax.data.text.files import expand, read_documents
from quantizable_flax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class _Source:
    documents: Callable[[ConfigDict, str], Iterator[str]]
    description: Callable[[ConfigDict, str], dict]


def iter_documents(data_cfg: ConfigDict, split: str) -> Iterator[str]:
    """Yields the documents of `split` ("train" or "validation") in a fixed order.

    Several corpora follow each other, whatever their weights. Raises UserError for an unknown
    source, for data that cannot be read and for a split without documents.
    """
    parts = [source.documents(config, split) for source, config in _sources(data_cfg, split)]
    return itertools.chain.from_iterable(parts)


def describe_documents(data_cfg: ConfigDict, split: str) -> dict:
    """Returns what decides the documents of `split`, without reading them, for cache keys."""
    parts = [source.description(config, split) for source, config in _sources(data_cfg, split)]
    return parts[0] if len(parts) == 1 else {"corpora": parts}


def _sources(data_cfg: ConfigDict, split: str) -> list[tuple[_Source, ConfigDict]]:
    if split not in SPLITS:
        raise UserError(
            f"expected a split among {', '.join(SPLITS)}, found {split!r}{nearest(split, SPLITS)}"
        )
    parts = corpora(data_cfg)
    if split == "validation" and data_cfg.validation_files:
        # Validation files serve whatever the training text is.
        return [(_SOURCES[FILES], data_cfg)]
    return [(_SOURCES[_kind(part.name)], part.config) for part in parts]


def _kind(name: str) -> str:
    return next((prefix for prefix in (TFDS, HUB) if name.startswith(prefix)), name)


def _embedded(data_cfg: ConfigDict, split: str) -> Iterator[str]:
    documents = iter(embedded_documents())
    return documents if data_cfg.validation_files else _share(documents, data_cfg, split)


def _describe_embedded(data_cfg: ConfigDict, split: str) -> dict:
    fraction = None if data_cfg.validation_files else validation_fraction(data_cfg)
    return {**embedded_description(), "split": split, "fraction": fraction}


def _files(data_cfg: ConfigDict, split: str) -> Iterator[str]:
    documents = read_documents(_paths(data_cfg, split), data_cfg.text_key)
    return documents if data_cfg.validation_files else _share(documents, data_cfg, split)


def _describe_files(data_cfg: ConfigDict, split: str) -> dict:
    files = []
    for path in _paths(data_cfg, split):
        stat = path.stat()
        files.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    fraction = None if data_cfg.validation_files else validation_fraction(data_cfg)
    return {
        "source": "files",
        "files": files,
        "split": split,
        "fraction": fraction,
        "text_key": data_cfg.text_key,
    }


def _paths(data_cfg: ConfigDict, split: str) -> list[Path]:
    if not data_cfg.files and not (split == "validation" and data_cfg.validation_files):
        raise UserError(
            "expected data.files for data.source='files', found it empty; "
            "set data.files to paths or globs, or data.source to 'embedded'"
        )
    train = expand(data_cfg.files, "data.files") if data_cfg.files else []
    if not data_cfg.validation_files:
        return train
    validation = expand(data_cfg.validation_files, "data.validation_files")
    check_disjoint(train, validation)
    return train if split == "train" else validation


def _share(documents: Iterable[str], data_cfg: ConfigDict, split: str) -> Iterator[str]:
    """Yields the documents whose own hash puts them into `split`.

    The text alone decides: neither the order of the documents nor the addition of others moves
    one across, and equal documents land on the same side.
    """
    fraction = validation_fraction(data_cfg)

    def share() -> Iterator[str]:
        found = kept = 0
        for text in documents:
            found += 1
            if (position(text) < fraction) == (split == "validation"):
                kept += 1
                yield text
        if not kept:
            raise UserError(
                f"expected documents for the {split} split, found none among {found} with "
                f"data.validation_fraction={fraction}; set data.validation_files or add documents"
            )

    return share()


def _library(prefix: str, module: Any, held_out: Sequence[str], *keys: str) -> _Source:
    """Returns the corpora of a library: a split of their own is for validation, else a share.

    Args:
      prefix: of data.source, before the name of a dataset.
      module: with `documents`, `describe` and `split_names`.
      held_out: splits of which the first that a dataset has is for validation.
      keys: of config.data that these functions take behind the name and the split.
    """

    def chosen(data_cfg: ConfigDict, split: str) -> tuple[tuple, str | None]:
        """What the functions take, and the dataset's own split, None where "train" is shared."""
        name = data_cfg.source.removeprefix(prefix)
        options = [data_cfg[key] for key in keys]
        own: str | None = "train"
        if not data_cfg.validation_files:
            own = _own_split(module.split_names(name, *options), split, held_out)
        return (name, own or "train", *options, data_cfg.text_key), own

    def documents(data_cfg: ConfigDict, split: str) -> Iterator[str]:
        arguments, own = chosen(data_cfg, split)
        found = module.documents(*arguments)
        return found if own else _share(found, data_cfg, split)

    def description(data_cfg: ConfigDict, split: str) -> dict:
        arguments, own = chosen(data_cfg, split)
        fraction = None if own else validation_fraction(data_cfg)
        return {**module.describe(*arguments), "part": split, "fraction": fraction}

    return _Source(documents, description)


def _own_split(names: Sequence[str], split: str, held_out: Sequence[str]) -> str | None:
    """Returns the dataset's split that serves as `split`, None where "train" is shared."""
    found = next((name for name in held_out if name in names), None)
    return found if split == "validation" or found is None else "train"


_SOURCES = {
    EMBEDDED: _Source(_embedded, _describe_embedded),
    FILES: _Source(_files, _describe_files),
    TFDS: _library(TFDS, tfds_text, ("validation", "test"), "tfds_dir"),
    HUB: _library(HUB, hub_text, VALIDATION_SPLITS),
}
