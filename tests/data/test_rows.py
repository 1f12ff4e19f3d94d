"""Rows of one document each: nothing is lost but small rests, and padding is told from tokens."""

import json
import shutil

import numpy as np
import pytest

from quantizable_flax.config import default_config
from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.kinds import LABELLED_TEXT, MASKED_TEXT, TEXT_ROWS, kind_of
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.share import Share
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.documents import iter_documents
from quantizable_flax.data.text.layouts import _AT_ONCE, MIN_REST
from quantizable_flax.data.text.packing import document_rows, packed_tokens
from quantizable_flax.errors import UserError

from .batches import assert_continues, assert_same, joined, take
from .heads import ROOT, with_head


@pytest.fixture(params=["wordpiece", "masked_byte_bpe"])
def kept(request, tokenizer, roberta_tokenizer):
    """The tokenizers that rows are made with."""
    return tokenizer if request.param == "wordpiece" else roberta_tokenizer


def assets_of(tokenizer):
    return {"tokenizer": json.loads(tokenizer.to_json())}


@pytest.fixture
def make_rows_task(text_config, tokenizer):
    def make(**overrides):
        return make_task(with_head(text_config(**overrides), "none"), assets_of(tokenizer))

    return make


def contents(rows_NxW, tokenizer, seq_len):
    """Returns the ids of each row, once all around them is as it has to be."""
    before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
    found = []
    for *tokens, length in rows_NxW.tolist():
        assert len(tokens) == seq_len
        assert len(before) + len(after) <= length <= seq_len
        assert tuple(tokens[: len(before)]) == before
        assert tuple(tokens[length - len(after) : length]) == after
        assert set(tokens[length:]) <= {tokenizer.pad_id}
        found.append(tokens[len(before) : length - len(after)])
    return found


def expected_contents(texts, tokenizer, seq_len):
    """Document by document, as the rule is said."""
    size = seq_len - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    for ids in tokenizer.encode_batch(texts):
        cut = [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]
        yield from cut if len(cut) == 1 or len(cut[-1]) >= min(MIN_REST, size) else cut[:-1]


@pytest.mark.parametrize("seq_len", [3, 9, 11, 16, 128])
@pytest.mark.parametrize("batch_chars", [1, 300, 1 << 20])
def test_nothing_is_lost_but_small_rests(text_config, kept, seq_len, batch_chars):
    config = text_config(seq_len=seq_len)
    rows_NxW = document_rows(config.data, kept, "train", batch_chars=batch_chars)
    texts = list(iter_documents(config.data, "train"))
    assert contents(rows_NxW, kept, seq_len) == list(expected_contents(texts, kept, seq_len))


def test_a_long_document_has_the_rows_that_it_has_whole(make_config, tokenizer, tmp_path):
    text = " ".join(f"the {number} fox" for number in range(120_000))  # several pieces
    lines = [json.dumps({"text": text}) for text in ("a short one", text, "the last")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(files=str(tmp_path / "a.jsonl"), validation_fraction=0.0, seq_len=64)
    rows_NxW = document_rows(config.data, tokenizer, "train")
    texts = ["a short one", text, "the last"]
    assert contents(rows_NxW, tokenizer, 64) == list(expected_contents(texts, tokenizer, 64))


def test_more_short_documents_than_are_padded_at_once(make_config, tokenizer, tmp_path):
    texts = ["the fox"] * (_AT_ONCE + 3)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    config = make_config(files=str(tmp_path / "a.txt"), validation_fraction=0.0)
    rows_NxW = document_rows(config.data, tokenizer, "train")
    assert len(rows_NxW) == len(texts)
    assert (rows_NxW == rows_NxW[0]).all()


def test_rows_and_blocks_are_kept_apart_and_both_are_found_again(
    text_config, tokenizer, monkeypatch
):
    config = text_config()
    makers = (document_rows, packed_tokens)
    first = [np.array(make(config.data, tokenizer, "train")) for make in makers]
    monkeypatch.setattr(tokenizer, "encode_batch", None)  # nobody reads the text again
    for make, before in zip(makers, first, strict=True):
        again = make(config.data, tokenizer, "train")
        assert isinstance(again, np.memmap)
        np.testing.assert_array_equal(again, before)


def test_batches_tell_padding_from_tokens(make_rows_task, tokenizer):
    task = make_rows_task()
    rows_NxW = np.stack(list(task.source("train")))
    batches = train_iterator(task, batch_size=8, seed=0)
    examples = joined(take(batches, len(rows_NxW) // 8))
    assert examples.keys() == {"input_ids", "attention_mask"}
    assert all(array.dtype == np.int32 for array in examples.values())
    ids_NxT, mask_NxT = examples["input_ids"], examples["attention_mask"]
    assert set(np.unique(mask_NxT)) == {0, 1}
    assert (np.diff(mask_NxT) <= 0).all()  # padding comes last
    assert (ids_NxT[mask_NxT == 0] == tokenizer.pad_id).all()
    assert (ids_NxT[mask_NxT == 1] != tokenizer.pad_id).all()
    # An epoch has every row once.
    rows = {tuple(row) for row in rows_NxW.tolist()}
    pairs = zip(ids_NxT.tolist(), mask_NxT.tolist(), strict=True)
    seen = {(*ids, sum(mask)) for ids, mask in pairs}
    assert len(seen) == len(ids_NxT)
    assert seen <= rows


def test_fillers_are_rows_of_tokens(make_rows_task, tokenizer):
    task = make_rows_task()
    count = len(task.source("validation"))
    size = next(size for size in range(3, 9) if count % size)
    examples = joined(list(eval_batches(task, batch_size=size)))
    filler = examples["example_weight"] == 0
    assert (~filler).sum() == count < len(filler)
    assert (examples["attention_mask"][filler] == 1).all()
    assert (examples["input_ids"][filler] == tokenizer.prefix_ids[0]).all()


def test_hosts_and_worker_processes_have_the_same_batches(make_rows_task):
    task = make_rows_task()
    whole = take(train_iterator(task, batch_size=8, seed=5), 4)
    with_workers = train_iterator(task, batch_size=8, seed=5, workers=2)
    parts = [
        take(train_iterator(task, batch_size=8, seed=5, share=Share((part,), 2)), 4)
        for part in range(2)
    ]
    for batch, other, *halves in zip(whole, take(with_workers, 4), *parts, strict=True):
        assert_same(batch, other)
        assert_same(batch, joined(halves))
    with_workers.close()


def test_a_run_continues_exactly_also_where_the_data_moved(make_rows_task, documents, tmp_path):
    task = make_rows_task()
    batches = train_iterator(task, batch_size=4, seed=3)
    take(batches, 5)
    state, expected = batches.get_state(), take(batches, 6)
    moved = shutil.copy(tmp_path / "text.txt", tmp_path / "moved.txt")
    assert_continues(task, state, expected, make_rows_task(files=str(moved)))
    moved.write_text("\n\n".join(documents[::-1]))
    other = make_rows_task(files=str(moved))
    assert difference(task.fingerprint, other.fingerprint, task.unit)


def test_corpora_are_mixed_by_weight(make_rows_task):
    task = make_rows_task(source="files*0.25,files*0.75")
    alone = make_rows_task()
    count = len(alone.source("train"))
    assert len(task.source("train")) == 4 * count  # the lighter one comes once
    assert take(train_iterator(task, batch_size=4, seed=0), 1)


def test_the_tokenizer_of_the_checkpoint_and_its_padding(text_config, kept):
    config = with_head(text_config(), "none")
    config.model.pad_token_id = kept.pad_id
    task = make_task(config, assets_of(kept))
    assert task.assets == assets_of(kept)
    config.model.pad_token_id = kept.pad_id + 4
    with pytest.raises(UserError, match=rf"which is {kept.pad_id}, found .*; set it to that"):
        make_task(config, assets_of(kept))


def test_a_row_too_short_for_a_token(text_config, tokenizer):
    with pytest.raises(UserError, match="at least 3, found 2"):
        document_rows(text_config(seq_len=2).data, tokenizer, "train")


def test_the_head_decides_what_a_model_learns_from():
    config = default_config("bert")
    assert kind_of(config) == MASKED_TEXT
    assert kind_of(with_head(config, "masked_lm")) == MASKED_TEXT
    for head, with_key in (("none", TEXT_ROWS), ("classifier", LABELLED_TEXT)):
        config = with_head(default_config("bert"), head)
        assert kind_of(config) == TEXT_ROWS
        config.data.label_key = "label"
        assert kind_of(config) == with_key


def test_batches_are_as_they_are_foretold(make_rows_task, text_config):
    config = with_head(text_config(), "none")
    with config.unlocked():
        config.train = default_config("bert").train
    specs = batch_specs(config)
    batches = train_iterator(make_rows_task(), batch_size=config.train.batch_size, seed=0)
    (batch,) = take(batches, 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == specs


def test_the_description_of_a_row_is_in_the_docs():
    page = (ROOT / "docs" / "data.md").read_text()
    assert f"fewer than {MIN_REST} tokens" in " ".join(page.split())
