"""Byte-level BPE for masked text: RoBERTa's tokens around documents, and its mask."""

import json

import numpy as np
import pytest

from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

from .batches import originals, take
from .test_byte_bpe import gpt2_vocab, write_files

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_special_tokens_of_roberta(roberta_tokenizer):
    tokenizer, last = roberta_tokenizer, roberta_tokenizer.vocab_size - 1
    assert tokenizer.kind == "masked_byte_bpe"
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((0,), (2,))
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (1, 3, last)
    assert tokenizer.special_ids == (0, 1, 2, 3, last)
    assert tokenizer.decode([0, last, 2, 1]) == "<s><mask></s><pad>"


def test_text_has_the_ids_of_the_same_merges_without_a_mask(
    roberta_tokenizer, byte_tokenizer, documents
):
    texts = [*documents, "a <mask> b", "</s><s>", "é9 日本語"]
    assert roberta_tokenizer.encode_batch(texts) == byte_tokenizer.encode_batch(texts)
    for text, ids in zip(texts, roberta_tokenizer.encode_batch(texts), strict=True):
        assert not set(ids) & set(roberta_tokenizer.special_ids)
        assert roberta_tokenizer.decode(ids) == text


def test_every_form_gives_the_same_tokenizer(tmp_path):
    first = Tokenizer.load(write_files(tmp_path, gpt2_vocab(SPECIALS)))
    assert first.kind == "masked_byte_bpe"
    # Files beside it name one end of a document; both are marked.
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    again = Tokenizer.load(tmp_path)
    assert again.to_json() == first.to_json()
    (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").same_ids(first)


def test_the_usual_file_of_roberta_is_known(roberta_tokenizer):
    content = json.loads(roberta_tokenizer.to_json())
    for kind in ("RobertaProcessing", "BertProcessing"):
        content["post_processor"] = {"type": kind, "sep": ["</s>", 2], "cls": ["<s>", 0]}
        if kind == "RobertaProcessing":
            content["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
        loaded = Tokenizer.from_json(json.dumps(content))
        assert loaded.kind == "masked_byte_bpe"
        assert loaded.same_ids(roberta_tokenizer)


def test_others_who_load_the_file_get_both_ends_too(roberta_tokenizer):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(roberta_tokenizer.to_json())
    ids = roberta_tokenizer.encode_batch(["the fox", "a dog"])
    assert inner.encode("the fox").ids == [0, *ids[0], 2]
    assert inner.encode("the fox", "a dog").ids == [0, *ids[0], 2, 2, *ids[1], 2]


@pytest.mark.parametrize("missing", ["<mask>", "<pad>", "<s>"])
def test_without_one_of_the_tokens_it_is_as_that_of_opt(tmp_path, missing):
    specials = [token for token in SPECIALS if token != missing]
    tokenizer = Tokenizer.load(write_files(tmp_path, gpt2_vocab(specials)))
    assert (tokenizer.kind, tokenizer.mask_id) == ("byte_bpe", None)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((specials.index("</s>"),), ())


def test_a_mask_added_to_the_tokenizer_of_opt_leaves_it_what_it_is(tmp_path, documents):
    folder = write_files(tmp_path, gpt2_vocab(SPECIALS[:-1]))
    plain = Tokenizer.load(folder)
    write_json(folder / "added_tokens.json", {"<mask>": plain.vocab_size})
    for name in ("", "vocab.json"):
        added = Tokenizer.load(folder / name)
        assert (added.kind, added.mask_id, added.prefix_ids) == ("byte_bpe", None, (2,))
        assert added.encode_batch(documents) == plain.encode_batch(documents)
    assert Tokenizer.from_json(added.to_json()).kind == "byte_bpe"


def test_masking_takes_its_mask_and_spares_its_special_tokens(text_config, roberta_tokenizer):
    config = text_config(mask_rate=0.5)
    task = make_task(config, {"tokenizer": json.loads(roberta_tokenizer.to_json())})
    for batch in take(train_iterator(task, batch_size=8, seed=0), 5):
        predicted = batch["labels"] != -100
        masked = batch["input_ids"] == roberta_tokenizer.mask_id
        special = np.isin(originals(batch), roberta_tokenizer.special_ids)
        assert not (predicted & special).any()
        assert 0.6 < masked[predicted].mean() < 0.95
        assert special.any()


def test_masked_text_takes_the_file_and_causal_text_does_not(
    text_config, roberta_tokenizer, tmp_path
):
    path = tmp_path / "tokenizer.json"
    path.write_text(roberta_tokenizer.to_json())
    config = text_config()
    config.data.tokenizer.file = str(path)
    assert make_task(config).assets["tokenizer"] == json.loads(roberta_tokenizer.to_json())
    config = text_config("opt")
    config.data.tokenizer.file = str(path)
    with pytest.raises(UserError, match=r"found a byte-level BPE with <mask> in .*json"):
        make_task(config)
