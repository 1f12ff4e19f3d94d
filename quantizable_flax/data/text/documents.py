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
from quantizable_flax.data.text.document import Document, Fields
from quantizable_flax.data.text.embedded import embedded_description, embedded_documents
from quantizable_flax.data.text.files import declared_classes as file_classes
from quantizable_flax.data.text.files import expand, read_documents
from quantizable_flax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class _Source:
    """What reads documents, describes them, and names their classes where these are declared."""

    documents: Callable[[ConfigDict, str, Fields], Iterator[Document]]
    description: Callable[[ConfigDict, str, Fields], dict]
    classes: Callable[[ConfigDict, str, Fields], Sequence[Sequence[str] | None]]


def iter_documents(data_cfg: ConfigDict, split: str) -> Iterator[str]:
    """Yields the documents of `split` ("train" or "validation") in a fixed order.

    Several corpora follow each other, whatever their weights. Raises UserError for an unknown
    source, for data that cannot be read and for a split without documents.
    """
    return (document.text for document in _documents(data_cfg, split, Fields(data_cfg.text_key)))


def iter_labelled(data_cfg: ConfigDict, split: str) -> Iterator[Document]:
    """Yields the same documents with their classes, which data.label_key holds.

    Raises UserError as `iter_documents`, and for a document without a class.
    """
    return _documents(data_cfg, split, _with_labels(data_cfg))


def describe_documents(data_cfg: ConfigDict, split: str, *, labelled: bool = False) -> dict:
    """Returns what decides the documents of `split`, without reading them, for cache keys.

    Args:
      data_cfg: config.data.
      split: "train" or "validation".
      labelled: whether their classes belong to them.
    """
    fields = _with_labels(data_cfg) if labelled else Fields(data_cfg.text_key)
    sources = _sources(data_cfg, split)
    parts = [source.description(config, split, fields) for source, config in sources]
    return parts[0] if len(parts) == 1 else {"corpora": parts}


def declared_classes(data_cfg: ConfigDict, split: str) -> list[str] | None:
    """Returns the names of the classes in their order, None where the data do not declare one."""
    fields = _with_labels(data_cfg)
    sources = _sources(data_cfg, split)
    each = [names for source, config in sources for names in source.classes(config, split, fields)]
    first = each[0] if each else None
    same = first is not None and all(names is not None and [*names] == [*first] for names in each)
    return [*first] if first is not None and same else None


def _with_labels(data_cfg: ConfigDict) -> Fields:
    return Fields(data_cfg.text_key, data_cfg.label_key)


def _documents(data_cfg: ConfigDict, split: str, fields: Fields) -> Iterator[Document]:
    sources = _sources(data_cfg, split)
    parts = [source.documents(config, split, fields) for source, config in sources]
    return itertools.chain.from_iterable(parts)


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


def _embedded(data_cfg: ConfigDict, split: str, fields: Fields) -> Iterator[Document]:
    _check_no_labels(fields)
    documents = map(Document, embedded_documents())
    return documents if data_cfg.validation_files else _share(documents, data_cfg, split)


def _describe_embedded(data_cfg: ConfigDict, split: str, fields: Fields) -> dict:
    _check_no_labels(fields)
    fraction = None if data_cfg.validation_files else validation_fraction(data_cfg)
    return {**embedded_description(), "split": split, "fraction": fraction}


def _check_no_labels(fields: Fields) -> None:
    if fields.label is not None:
        raise UserError(
            f"expected texts with classes for data.label_key={fields.label!r}, found the embedded "
            "corpus, which has none; set data.files to JSON lines or parquet, or data.source to a "
            "dataset, or unset data.label_key"
        )


def _files(data_cfg: ConfigDict, split: str, fields: Fields) -> Iterator[Document]:
    documents = read_documents(_paths(data_cfg, split), fields)
    return documents if data_cfg.validation_files else _share(documents, data_cfg, split)


def _describe_files(data_cfg: ConfigDict, split: str, fields: Fields) -> dict:
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
        **fields.description,
    }


def _file_classes(data_cfg: ConfigDict, split: str, fields: Fields) -> list[Sequence[str] | None]:
    return file_classes(_paths(data_cfg, split), fields)


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


def _share(documents: Iterable[Document], data_cfg: ConfigDict, split: str) -> Iterator[Document]:
    """Yields the documents whose own hash puts them into `split`.

    The text alone decides: neither the order of the documents nor the addition of others moves
    one across, and equal documents land on the same side.
    """
    fraction = validation_fraction(data_cfg)

    def share() -> Iterator[Document]:
        found = kept = 0
        for document in documents:
            found += 1
            if (position(document.text) < fraction) == (split == "validation"):
                kept += 1
                yield document
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
      module: with `documents`, `describe`, `classes` and `split_names`.
      held_out: splits of which the first that a dataset has is for validation.
      keys: of config.data that these functions take behind the name and the split.
    """

    def chosen(data_cfg: ConfigDict, split: str, fields: Fields) -> tuple[tuple, str | None]:
        """What the functions take, and the dataset's own split, None where "train" is shared."""
        name = data_cfg.source.removeprefix(prefix)
        options = [data_cfg[key] for key in keys]
        own: str | None = "train"
        if not data_cfg.validation_files:
            own = _own_split(module.split_names(name, *options), split, held_out)
        return (name, own or "train", *options, fields), own

    def documents(data_cfg: ConfigDict, split: str, fields: Fields) -> Iterator[Document]:
        arguments, own = chosen(data_cfg, split, fields)
        found = module.documents(*arguments)
        return found if own else _share(found, data_cfg, split)

    def description(data_cfg: ConfigDict, split: str, fields: Fields) -> dict:
        arguments, own = chosen(data_cfg, split, fields)
        fraction = None if own else validation_fraction(data_cfg)
        return {**module.describe(*arguments), "part": split, "fraction": fraction}

    def classes(data_cfg: ConfigDict, split: str, fields: Fields) -> list[Sequence[str] | None]:
        return [module.classes(*chosen(data_cfg, split, fields)[0])]

    return _Source(documents, description, classes)


def _own_split(names: Sequence[str], split: str, held_out: Sequence[str]) -> str | None:
    """Returns the dataset's split that serves as `split`, None where "train" is shared."""
    found = next((name for name in held_out if name in names), None)
    return found if split == "validation" or found is None else "train"


_SOURCES = {
    EMBEDDED: _Source(_embedded, _describe_embedded, lambda *_: [None]),
    FILES: _Source(_files, _describe_files, _file_classes),
    TFDS: _library(TFDS, tfds_text, ("validation", "test"), "tfds_dir"),
    HUB: _library(HUB, hub_text, VALIDATION_SPLITS),
}
