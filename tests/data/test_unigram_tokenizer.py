"""Unigram for masked text, as XLM-R and the multilingual E5 have it."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

from .batches import originals, take

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


@pytest.fixture
def usual(documents):
    """The library's tokenizer, in the form in which XLM-R is published."""
    letters = sorted({c for text in documents for c in text if not c.isspace()})
    words = sorted({word for text in documents for word in text.split()})[:80]
    pieces = [(token, 0.0) for token in SPECIALS]
    pieces += [("▁", -2.0), *((f"▁{word}", -5.0) for word in words)]
    pieces += [(letter, -8.0) for letter in letters if letter not in dict(pieces)]
    pieces += [("<mask>", 0.0)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    inner.add_special_tokens([*SPECIALS, tokenizers.AddedToken("<mask>", lstrip=True)])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return inner


@pytest.fixture
def unigram(usual):
    return Tokenizer.from_json(usual.to_str())


def test_special_tokens_of_xlm_r(unigram):
    last = unigram.vocab_size - 1
    assert unigram.kind == "masked_unigram"
    assert (unigram.prefix_ids, unigram.suffix_ids) == ((0,), (2,))
    assert (unigram.pad_id, unigram.unk_id, unigram.mask_id) == (1, 3, last)
    assert unigram.special_ids == (0, 1, 2, 3, last)


def test_text_has_the_ids_of_the_library(unigram, usual, documents):
    for text, ids in zip(documents, unigram.encode_batch(documents), strict=True):
        assert [0, *ids, 2] == usual.encode(text).ids
        assert not set(ids) & {0, 1, 2, unigram.mask_id}
    (ids,) = unigram.encode_batch(["a <mask> </s> b"])  # which must not smuggle them in
    assert [i for i in ids if i in unigram.special_ids] == [unigram.unk_id] * 2


def test_scores_belong_to_the_tokenizer(usual, unigram):
    assert unigram.same_ids(Tokenizer.from_json(usual.to_str()))
    content = json.loads(usual.to_str())
    content["model"]["vocab"][5][1] = -9.0
    assert not unigram.same_ids(Tokenizer.from_json(json.dumps(content)))


def test_masking_takes_its_mask_and_spares_its_special_tokens(text_config, unigram, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(unigram.to_json())
    config = text_config(mask_rate=0.5)
    config.data.tokenizer.file = str(path)
    for batch in take(train_iterator(make_task(config), batch_size=8, seed=0), 5):
        predicted = batch["labels"] != -100
        assert not (predicted & np.isin(originals(batch), unigram.special_ids)).any()
        assert 0.6 < (batch["input_ids"] == unigram.mask_id)[predicted].mean() < 0.95


def test_it_is_no_tokenizer_of_causal_text(text_config, unigram, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(unigram.to_json())
    config = text_config("opt")
    config.data.tokenizer.file = str(path)
    with pytest.raises(UserError, match=r"found a Unigram with <mask> in .*json"):
        make_task(config)


def test_without_a_mask_it_is_refused(usual):
    content = json.loads(usual.to_str())
    content["model"]["vocab"].pop()
    content["added_tokens"].pop()
    with pytest.raises(UserError, match=r"expected a tokenizer with .*\[MASK\]"):
        Tokenizer.from_json(json.dumps(content))
