"""Text from TFDS, several corpora one after another, and corpora mixed by weight."""

import collections
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import tensorflow_datasets as tfds

from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.text.blocks import Blocks, Mixture
from quantizable_flax.data.text.corpora import corpora
from quantizable_flax.data.text.packing import packed_tokens
from quantizable_flax.data.text.tokenizer_build import build_tokenizer, training_documents

from .batches import take
from .conftest import random_documents
from .texts import documents, expect_error
from .tfds_builders import build

WIKI = (
    "\n_START_ARTICLE_\nA Title\n_START_SECTION_\nHistory\n"
    "_START_PARAGRAPH_\nFirst line._NEWLINE_Second line.\n_START_PARAGRAPH_\nLast."
)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Returns a TFDS folder with corpora of the splits that the real ones have."""
    path = str(tmp_path_factory.mktemp("tfds"))
    texts = random_documents(400, seed=1)
    build(path, "c4", {"train": texts[:60], "validation": texts[60:80]}, config="en")
    build(path, "lm1b", {"train": texts[80:200], "test": texts[200:220]})
    build(path, "wikipedia", {"train": texts[220:]}, config="20230601.en")
    wiki = {"train": [WIKI], "validation": [WIKI], "test": [WIKI]}
    build(path, "wiki40b", wiki, config="en")
    features = {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int32)}
    build(path, "blank", {"train": [{"text": "\n ", "id": 3}]}, features=features)
    return path


@pytest.fixture
def tfds_config(make_config, tfds_dir):
    def make(source, family="bert", **overrides):
        return make_config(family, source=source, tfds_dir=tfds_dir, **overrides)

    return make


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [("c4/en", (0, 60), (60, 80)), ("lm1b", (80, 200), (200, 220))],
)
def test_the_splits_of_the_dataset_are_taken(tfds_config, name, train, validation):
    texts, config = random_documents(400, seed=1), tfds_config(f"tfds:{name}")
    assert sorted(documents(config)) == sorted(texts[slice(*train)])
    assert sorted(documents(config, "validation")) == sorted(texts[slice(*validation)])


def test_a_dataset_with_train_only_is_shared_by_hash(tfds_config):
    config = tfds_config("tfds:wikipedia")
    train, validation = documents(config), documents(config, "validation")
    assert sorted(train + validation) == sorted(random_documents(400, seed=1)[220:])
    assert 15 <= len(validation) <= 57  # 36 expected of 180 at 0.2, four standard deviations


def test_validation_files_leave_the_training_split_whole(tfds_config, tmp_path):
    (tmp_path / "mine.txt").write_text("my own words")
    config = tfds_config("tfds:wikipedia,tfds:lm1b", validation_files=str(tmp_path / "mine.txt"))
    assert documents(config, "validation") == ["my own words"]
    assert len(documents(config)) == 180 + 120


def test_the_markers_of_wiki40b_become_line_breaks(tfds_config):
    (text,) = documents(tfds_config("tfds:wiki40b/en"))
    assert text == "A Title\n\nHistory\n\nFirst line.\nSecond line.\n\nLast."


@pytest.mark.parametrize("weights", [("", ""), ("*0.9", "*0.1")])
def test_corpora_follow_each_other_in_the_order_given(tfds_config, weights):
    first, second = (documents(tfds_config(name)) for name in ("tfds:lm1b", "tfds:c4/en"))
    source = f"tfds:lm1b{weights[0]}, tfds:c4/en{weights[1]}"
    assert documents(tfds_config(source)) == first + second
    held_out = documents(tfds_config(source), "validation")
    assert len(held_out) == 40


def test_files_and_tfds_together(tfds_config, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    config = tfds_config("files,tfds:lm1b", files=str(tmp_path / "a.txt"), validation_fraction=0.0)
    assert documents(config)[:2] == ["one", "two"]
    assert len(documents(config)) == 122


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("tfds:lm1b*0.5,tfds:c4/en", "a weight on every corpus of data.source or on none"),
        ("tfds:lm1b*0,tfds:c4/en*1", r"a weight above 0 .* found 'tfds:lm1b\*0'"),
        ("tfds:lm1b*-1,tfds:c4/en*1", "a weight above 0"),
        ("tfds:lm1b*nan,tfds:c4/en*1", "a weight above 0"),
        ("tfds:lm1b*half", r"write for example tfds:lm1b\*0\.5"),
        ("tfds:lm1b*1/0", "a weight above 0"),
        ("tfds:lm1b,", r"files, tfds:NAME, hf:NAME\[,CONFIG\], found ''"),
        ("tdfs:lm1b", "found 'tdfs:lm1b'"),
        ("tfds:lm2b", r"build it, .*: tfds build lm2b --data_dir"),
        ("files,tfds:lm1b", "expected data.files for data.source='files', found it empty"),
    ],
)
def test_sources_that_make_no_sense(tfds_config, source, pattern):
    expect_error(tfds_config(source), pattern)


def test_files_that_nothing_reads(tfds_config):
    expect_error(tfds_config("tfds:lm1b", files="a.txt"), "data.files to be empty for .*tfds:lm1b")


def test_keys_that_hold_no_text(tfds_config):
    config = tfds_config("tfds:lm1b", text_key="txt")
    expect_error(config, r"found text \(did you mean 'text'\?\); set data.text_key")
    config = tfds_config("tfds:blank", text_key="id", validation_fraction=0.0)
    expect_error(config, "under the feature 'id' of the TFDS dataset blank, found int")
    expect_error(tfds_config("tfds:blank"), "found none among 0")


def test_the_cache_knows_datasets_apart(tfds_config, tokenizer):
    sources = ["tfds:lm1b", "tfds:c4/en", "tfds:lm1b,tfds:c4/en", "tfds:c4/en,tfds:lm1b"]
    packed = [packed_tokens(tfds_config(name).data, tokenizer, "train") for name in sources]
    assert len({tokens_NxT.tobytes() for tokens_NxT in packed}) == 4
    for name, tokens_NxT in zip(sources, packed, strict=True):
        again_NxT = packed_tokens(tfds_config(name).data, tokenizer, "train")
        np.testing.assert_array_equal(again_NxT, tokens_NxT)
        assert again_NxT.filename == tokens_NxT.filename
    assert len({tokens_NxT.filename for tokens_NxT in packed}) == 4


def test_a_tokenizer_is_trained_on_every_corpus(tfds_config, tmp_path):
    (tmp_path / "greek.txt").write_text("\n\n".join(["αβγδε ζηθ"] * 300))
    config = tfds_config("tfds:lm1b,files", "opt", files=str(tmp_path / "greek.txt"))
    trained = build_tokenizer(config.data, "byte_bpe")
    merged = [trained.decode([token]).strip() for token in range(260, trained.vocab_size)]
    assert any(len(piece) > 1 and piece.isascii() for piece in merged)
    assert "αβγδε" in merged
    # Of text that is too long, each corpus has its half.
    texts = list(training_documents(config.data, max_chars=2000))
    greek = [text for text in texts if not text.isascii()]
    assert sum(map(len, greek)) == sum(map(len, texts)) / 2 == 1000


def test_a_mixture_holds_every_block_in_the_asked_shares():
    lengths, weights = [1000, 90, 7], [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]
    blocks = [
        Blocks(np.stack([np.full(length, corpus), np.arange(length)], axis=1))
        for corpus, length in enumerate(lengths)
    ]
    mixture = Mixture(blocks, weights)
    counts = collections.Counter(tuple(mixture[index]) for index in range(len(mixture)))
    shares = [sum(n for (c, _), n in counts.items() if c == corpus) for corpus in range(3)]
    # The largest for its weight is seen once, the others as often as their weights say.
    assert shares == [1000, 286, 143]  # 1000 / 0.7 blocks, rounded up for each corpus
    assert len(mixture) == sum(shares)
    for corpus, length in enumerate(lengths):
        seen = [counts[corpus, index] for index in range(length)]
        assert min(seen) >= 1
        assert max(seen) - min(seen) <= 1
    copy = pickle.loads(pickle.dumps(mixture))
    assert all((copy[index] == mixture[index]).all() for index in range(len(mixture)))


def test_weights_decide_what_a_batch_holds(tfds_config, make_text_task):
    task = make_text_task(tfds_config("tfds:c4/en*0.25,tfds:lm1b*0.75", "opt"))
    c4_only = make_text_task(tfds_config("tfds:c4/en", "opt")).source("train")
    c4 = {row.tobytes() for row in c4_only}

    def share(seed):
        count = len(task.source("train")) // 50
        batches = take(train_iterator(task, batch_size=50, seed=seed), count)
        rows = [batch["labels"].astype(np.uint16) for batch in batches]
        return [np.mean([row.tobytes() in c4 for row in rows_BxT]) for rows_BxT in rows]

    shares = share(seed=3)
    # A block of 50 at 0.25 has a standard deviation of 0.061; an epoch holds the exact share.
    assert all(abs(found - 0.25) < 5 * 0.061 for found in shares)
    assert abs(np.mean(shares) - 0.25) < 0.02
    assert share(seed=3) == shares != share(seed=4)


def test_a_mixture_validates_on_all_its_corpora(tfds_config, make_text_task):
    source = "tfds:c4/en{},tfds:lm1b{}"
    mixed = make_text_task(tfds_config(source.format("*0.9", "*0.1")))
    both = make_text_task(tfds_config(source.format("", "")))
    np.testing.assert_array_equal(
        np.stack(list(mixed.source("validation"))), np.stack(list(both.source("validation")))
    )


def test_one_weighted_corpus_is_that_corpus(tfds_config, make_text_task):
    sources = [make_text_task(tfds_config(f"tfds:lm1b{w}")).source("train") for w in ("*3", "")]
    np.testing.assert_array_equal(*(np.stack(list(source)) for source in sources))


def test_corpora_are_parsed_exactly(tfds_config):
    parts = corpora(tfds_config(" tfds:a/b.c-d:1.2.3 * 0.1 , embedded*3 ").data)
    assert [(part.name, part.weight) for part in parts] == [
        ("tfds:a/b.c-d:1.2.3", Fraction(1, 10)),
        ("embedded", Fraction(3)),
    ]


def test_blocks_of_a_file_pickle_as_its_name(tfds_config, tokenizer):
    tokens_NxT = packed_tokens(tfds_config("tfds:lm1b").data, tokenizer, "train")
    pickled = pickle.dumps(Blocks(tokens_NxT))
    assert len(pickled) < tokens_NxT.nbytes / 4
    assert re.search(rb"train-\w+\.tokens", pickled)
    np.testing.assert_array_equal(np.stack(list(pickle.loads(pickled))), tokens_NxT)
