"""The tasks of encoders: rows of text with their padding, alone or with the class of each."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.data.draws import Draws
from quantizable_flax.data.task import Batch, BatchTransform, Transform
from quantizable_flax.data.text.classes import Classes, are_named, training_names
from quantizable_flax.data.text.packing import document_rows
from quantizable_flax.data.text.task import TextTask
from quantizable_flax.data.text.tokenizer import WORDPIECE
from quantizable_flax.errors import UserError


class RowsTask(TextTask):
    """Rows of one document each: {"input_ids", "attention_mask"}, int32 [B, T].

    The mask is 1 for tokens and 0 for padding. Fillers have tokens only, so that every row of a
    batch has something to attend to.
    """

    kind = WORDPIECE
    padding_advice = "set it to that or leave it unset"

    def __init__(self, config: ConfigDict, assets: Mapping[str, Any] | None = None):
        super().__init__(config, assets)
        self.filler = {"input_ids": self.tokenizer.prefix_ids[0], "attention_mask": 1}

    def _lay_out(self, data_cfg: ConfigDict, split: str) -> np.ndarray:
        return document_rows(data_cfg, self.tokenizer, split)

    def transform(self, *, train: bool) -> Transform:
        """Returns what parts rows into tokens and mask, the same in training and evaluation."""
        return SplitRows(self._config.data.seq_len)


class LabelledTextTask(RowsTask):
    """The first row of every document, and `labels`, int32 [B]: the number of its class.

    The names of the classes are those of the checkpoint, else those that the training data
    declare, else those that they have, sorted; documents that number their class need none.
    Fillers are of class 0.
    """

    def __init__(self, config: ConfigDict, assets: Mapping[str, Any] | None = None):
        super().__init__(config, assets)
        self._count = config.model.num_classes
        self._known = None if assets is None else assets.get("classes")
        if self._known is not None:
            self._check_names(self._known, "the checkpoint")

    @functools.cached_property
    def classes(self) -> list[str] | None:
        """The name of each class, None where the documents number them."""
        if self._known is None and not are_named(self._config.data, "train"):
            return None
        return self._names

    @functools.cached_property
    def _names(self) -> list[str]:
        if self._known is not None:
            return list(self._known)
        found = training_names(self._config.data)
        self._check_names(found, "the training data")
        return found

    def _check_names(self, names: Any, where: str) -> None:
        listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not listed or len(names) != self._count:
            found = f"{len(names)} classes" if listed else f"{type(names).__name__}"
            raise UserError(
                f"expected as many names of classes in {where} as model.num_classes, which is "
                f"{self._count}, found {found}; set model.num_classes or correct data.label_key"
            )

    @property
    def assets(self) -> dict[str, Any]:
        """The tokenizer, and the names of the classes where they have some."""
        names = {} if self.classes is None else {"classes": self.classes}
        return {**super().assets, **names}

    def _lay_out(self, data_cfg: ConfigDict, split: str) -> np.ndarray:
        names = self._names if are_named(data_cfg, split) else None
        classes = Classes(names, self._count)
        return document_rows(data_cfg, self.tokenizer, split, classes=classes)

    def transform(self, *, train: bool) -> Transform:
        """Returns what parts rows into tokens, mask and class."""
        return SplitRows(self._config.data.seq_len, labelled=True)


class SplitRows(BatchTransform):
    """Maps rows of `packing.document_rows` to `input_ids`, `attention_mask` and `labels`.

    Args:
      seq_len: T, the tokens of a row.
      labelled: whether a row tells its class.
    """

    def __init__(self, seq_len: int, *, labelled: bool = False):
        self._seq_len, self._labelled = seq_len, labelled

    def batch(self, elements: np.ndarray, draws: Draws) -> Batch:
        """Returns int32 [B, T], [B, T] and, where a row tells its class, [B]."""
        rows_BxW, T = np.asarray(elements, np.int32), self._seq_len
        mask_BxT = np.arange(T) < rows_BxW[:, T, None]
        batch = {"input_ids": rows_BxW[:, :T].copy(), "attention_mask": mask_BxT.astype(np.int32)}
        return batch | {"labels": rows_BxW[:, T + 1].copy()} if self._labelled else batch
