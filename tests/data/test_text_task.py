"""The tasks of BERT and OPT, and tokenizers that do not fit."""

import json

import numpy as np
import pytest

from quantizable_flax.data.draws import Randomness
from quantizable_flax.data.pipeline import eval_batches
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.packing import packed_tokens
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.data.text.tokenizer_build import build_tokenizer
from quantizable_flax.errors import UserError

from .batches import joined, originals


def assets_of(tokenizer):
    return {"tokenizer": json.loads(tokenizer.to_json())}


def test_opt_examples_are_the_tokens_twice(text_config, make_text_task, byte_tokenizer):
    config = text_config("opt")
    task = make_text_task(config)
    tokens_NxT = packed_tokens(config.data, byte_tokenizer, "train")
    for train in (True, False):
        blocks = task.source("train").take(np.array([3, 1]))
        batch = task.transform(train=train).batch(blocks, Randomness(0).of([3, 1]))
        assert batch.keys() == {"input_ids", "labels"}
        for array_BxT in batch.values():
            np.testing.assert_array_equal(array_BxT, tokens_NxT[[3, 1]])
            assert array_BxT.dtype == np.int32


def test_fillers_have_no_label(text_config, make_text_task):
    for family in ("bert", "opt"):
        task = make_text_task(text_config(family))
        count = len(task.source("validation"))
        size = next(size for size in range(3, 9) if count % size)
        examples = joined(list(eval_batches(task, batch_size=size)))
        weight = examples["example_weight"]
        assert weight.sum() == count < len(weight)
        assert (examples["labels"][weight == 0] == -100).all()
        expected = np.stack(list(task.source("validation")))
        np.testing.assert_array_equal(originals(examples)[weight == 1], expected)


def test_every_document_of_opt_starts_with_its_token(text_config, make_text_task, documents):
    task = make_text_task(text_config("opt", validation_fraction=0.0, seq_len=7))
    stream = np.stack(list(task.source("train"))).ravel()
    decoded = task.tokenizer.decode(stream).split("</s>")
    assert decoded[0] == ""
    assert decoded[1:-1] == documents[: len(decoded) - 2]
    assert len(decoded) > 0.95 * len(documents)


def test_a_task_trains_its_tokenizer_and_assets_bring_it_back(text_config):
    for family in ("bert", "opt"):
        config = text_config(family)
        first = make_task(config)
        kept = json.loads(json.dumps(first.assets))
        again = make_task(config, kept)
        assert again.assets == first.assets
        assert again.tokenizer.to_json() == first.tokenizer.to_json()
        assert again.unit == "sequences"


def test_a_checkpoint_needs_no_text_for_its_tokenizer(text_config, tokenizer):
    config = text_config(files="gone.txt")
    assert make_task(config, assets_of(tokenizer)).tokenizer.same_ids(tokenizer)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_more_tokens_than_the_model_has(text_config, family):
    config = text_config(family)
    config.model.vocab_size = 50
    with pytest.raises(UserError, match=r"tokenizer has \d+ tokens but model.vocab_size is 50"):
        make_task(config)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_tokenizers_of_the_other_family(text_config, tokenizer, byte_tokenizer, tmp_path, family):
    other = byte_tokenizer if family == "bert" else tokenizer
    config = text_config(family)
    kinds = ["a WordPiece", "a byte-level BPE without <mask>"]
    wanted, found = kinds if family == "bert" else kinds[::-1]
    pattern = f"expected {wanted}.* as the tokenizer of this model, found {found} in "
    with pytest.raises(UserError, match=pattern + "the checkpoint"):
        make_task(config, assets_of(other))
    config.data.tokenizer.file = str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(UserError, match=pattern + ".*tokenizer.json"):
        make_task(config)


def test_checkpoints_without_a_tokenizer(text_config):
    with pytest.raises(UserError, match="a tokenizer in the checkpoint, found classes"):
        make_task(text_config(), {"classes": ["a"]})
    with pytest.raises(UserError, match=r"a tokenizer\.json in the checkpoint, found content"):
        make_task(text_config(), {"tokenizer": {"a": 1}})


class TestFileOfACheckpoint:
    """data.tokenizer.file beside the tokenizer that a checkpoint holds."""

    @pytest.fixture
    def config(self, text_config, tmp_path):
        config = text_config()
        config.data.tokenizer.file = str(tmp_path / "tokenizer.json")
        return config

    def test_the_same_tokenizer_from_another_format(self, config, tmp_path, tokenizer):
        vocab = json.loads(tokenizer.to_json())["model"]["vocab"]
        lines = "".join(f"{piece}\n" for piece in sorted(vocab, key=vocab.get))
        (tmp_path / "vocab.txt").write_text(lines)
        config.data.tokenizer.file = str(tmp_path / "vocab.txt")
        task = make_task(config, assets_of(tokenizer))
        assert task.tokenizer.to_json() == tokenizer.to_json()

    def test_another_tokenizer(self, config, tmp_path, tokenizer, documents):
        other = Tokenizer.train_wordpiece(documents, vocab_size=60)
        (tmp_path / "tokenizer.json").write_text(other.to_json())
        pattern = f"found another one of {other.vocab_size} tokens in .*json"
        with pytest.raises(UserError, match=pattern):
            make_task(config, assets_of(tokenizer))

    def test_a_cased_tokenizer_instead_of_a_lowercase_one(self, config, tmp_path, tokenizer):
        cased = tokenizer.to_json().replace('"lowercase": true', '"lowercase": false')
        cased = cased.replace('"lowercase":true', '"lowercase":false')
        (tmp_path / "tokenizer.json").write_text(cased)
        with pytest.raises(UserError, match="to be the tokenizer of the checkpoint"):
            make_task(config, assets_of(tokenizer))

    def test_a_file_that_is_gone_does_not_matter(self, config, tokenizer):
        assert make_task(config, assets_of(tokenizer)).tokenizer.same_ids(tokenizer)
        with pytest.raises(UserError, match=r"readable UTF-8 file in .*tokenizer\.json"):
            make_task(config)


def test_caches_of_both_kinds_are_told_apart(text_config):
    config = text_config("bert")
    config.data.tokenizer.vocab_size = 300
    kinds = [build_tokenizer(config.data, kind).kind for kind in ("wordpiece", "byte_bpe") * 2]
    assert kinds == ["wordpiece", "byte_bpe"] * 2
