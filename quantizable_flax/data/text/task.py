"""The tasks of the text models: masked and causal language modelling on packed blocks."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.data.draws import Draws
from quantizable_flax.data.task import Batch, BatchTransform, Source, Task, Transform
from quantizable_flax.data.text.blocks import Blocks, Mixture
from quantizable_flax.data.text.corpora import EMBEDDED, corpora
from quantizable_flax.data.text.kept import checksum
from quantizable_flax.data.text.masking import IGNORE_LABEL, MaskTokens
from quantizable_flax.data.text.packing import packed_tokens
from quantizable_flax.data.text.tokenizer import BYTE_BPE, WORDPIECE, Tokenizer
from quantizable_flax.data.text.tokenizer_build import (
    build_tokenizer,
    check_kind,
    is_file_of,
    load_file,
)
from quantizable_flax.errors import UserError


class TextTask(Task):
    """Sequences of data.seq_len tokens, packed without padding unless a task lays them out else.

    Attributes:
      kind: of the tokenizer, "wordpiece" or "byte_bpe".
      padding_advice: what to do about a wrong model.pad_token_id.
      tokenizer: from the checkpoint's assets, else from its file or trained.
    """

    unit = "sequences"
    filler: Mapping[str, int] = {"labels": IGNORE_LABEL}
    kind: ClassVar[str]
    padding_advice: ClassVar[str] = "packed text has no padding, so it may stay unset"

    def __init__(self, config: ConfigDict, assets: Mapping[str, Any] | None = None):
        if assets is None:
            self.tokenizer = build_tokenizer(config.data, self.kind)
        else:
            self.tokenizer = _from_assets(assets, config.data, self.kind)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but model.vocab_size is "
                f"{config.model.vocab_size}: raise model.vocab_size or take another tokenizer."
            )
        self._check_padding(config.model.pad_token_id)
        self._config = config
        self._sources: dict[str, Source] = {}
        self._content: list[list[Any]] = []

    def _check_padding(self, pad_token_id: int | None) -> None:
        """The row of another token would get no gradient from the lookup."""
        if pad_token_id is not None and pad_token_id != self.tokenizer.pad_id:
            raise UserError(
                f"expected model.pad_token_id to be the tokenizer's padding token, which is "
                f"{self.tokenizer.pad_id}, found {pad_token_id}; {self.padding_advice}"
            )

    def source(self, split: str) -> Source:
        """Returns the blocks or rows of a split: read-only numbers, uint16 or int32.

        Corpora with weights are packed each on its own and mixed for training; without, or for
        validation, their documents follow each other.
        """
        if split not in self._sources:
            self._sources[split] = self._open(split)
        return self._sources[split]

    def _open(self, split: str) -> Source:
        data_cfg = self._config.data
        parts = corpora(data_cfg)
        weights = [part.weight for part in parts if part.weight is not None]
        mixed = split == "train" and len(weights) > 1
        configs = [part.config for part in parts] if mixed else [data_cfg]
        packed = [self._lay_out(config, split) for config in configs]
        if split == "train":
            shares = map(str, weights) if mixed else ["1"]
            self._content = [
                [share, len(tokens_NxT), checksum(tokens_NxT)]
                for share, tokens_NxT in zip(shares, packed, strict=True)
            ]
        blocks = [Blocks(tokens_NxT) for tokens_NxT in packed]
        return Mixture(blocks, weights) if mixed else blocks[0]

    def _lay_out(self, data_cfg: ConfigDict, split: str) -> np.ndarray:
        """Returns what a source of one corpus holds; tokens_NxT of the packed one."""
        return packed_tokens(data_cfg, self.tokenizer, split)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number and checksum of the blocks or rows, and whose corpus the embedded one is."""
        found = {"examples": len(self.source("train")), "content": self._content}
        if any(part.name == EMBEDDED for part in corpora(self._config.data)):
            found["python"] = platform.python_version()
        return found

    @property
    def assets(self) -> dict[str, Any]:
        """The tokenizer, as the content of a tokenizer.json."""
        return {"tokenizer": json.loads(self.tokenizer.to_json())}


class MaskedLmTask(TextTask):
    """BERT's: predict the tokens that are masked."""

    kind = WORDPIECE

    def transform(self, *, train: bool) -> Transform:
        """Returns the masking, the same in training and evaluation."""
        config = self._config
        return MaskTokens(
            self.tokenizer, config.data.mask_rate, config.model.get("max_predictions", 0)
        )


class CausalLmTask(TextTask):
    """OPT's: predict every next token; the model's loss shifts the labels."""

    kind = BYTE_BPE

    def transform(self, *, train: bool) -> Transform:
        """Returns the copy of the tokens to `input_ids` and `labels`, both int32 [B, T]."""
        return CopyTokens()


class CopyTokens(BatchTransform):
    """Maps tokens_BxT to equal `input_ids` and `labels`, both int32 [B, T]."""

    def batch(self, elements: np.ndarray, draws: Draws) -> Batch:
        """Returns the examples of some blocks."""
        tokens_BxT = np.array(elements, dtype=np.int32)
        return {"input_ids": tokens_BxT, "labels": tokens_BxT.copy()}


def _from_assets(assets: Mapping[str, Any], data_cfg: ConfigDict, kind: str) -> Tokenizer:
    """Returns the tokenizer of a checkpoint, which data.tokenizer.file must not contradict.

    A published model may come without one: then the file has it.
    """
    if "tokenizer" not in assets:
        if data_cfg.tokenizer.file:
            return build_tokenizer(data_cfg, kind)
        raise UserError(
            "expected a tokenizer in the checkpoint, found "
            f"{', '.join(assets) or 'none that can be used'}; it is of another model or damaged, "
            "name its tokenizer by data.tokenizer.file or take another checkpoint"
        )
    saved = Tokenizer.from_json(json.dumps(assets["tokenizer"]), origin="the checkpoint")
    check_kind(saved, kind, "the checkpoint")
    file = data_cfg.tokenizer.file
    # The file may be gone or on another machine: the checkpoint holds what it needs.
    readable = file and os.access(Path(file).expanduser(), os.R_OK)
    if readable and not is_file_of(saved, data_cfg):
        raise UserError(
            f"expected data.tokenizer.file to be the tokenizer of the checkpoint, which has "
            f"{saved.vocab_size} tokens, found another one of {load_file(data_cfg).vocab_size} "
            f"tokens in {file}; leave data.tokenizer.file out or start a new run"
        )
    return saved
