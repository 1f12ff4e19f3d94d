"""Files beside a vocabulary say how it is used."""

import json
import logging

import pytest

from quantizable_flax.config import from_dict, override, to_json
from quantizable_flax.data.tasks import make_task
from quantizable_flax.data.text.subword import BERT_TOKENS
from quantizable_flax.data.text.tokenizer import Tokenizer
from quantizable_flax.data.text.tokenizer_build import build_tokenizer
from quantizable_flax.errors import UserError

from .test_byte_bpe import gpt2_vocab, write_files

PIECES = [*BERT_TOKENS, "The", "the", "Fox", "fox", "ca", "##fé", "##fe", "日", "日本"]
CASED, LOWER = ["The", "fox"], ["the", "fox"]


@pytest.fixture
def vocab(tmp_path):
    """Returns the path of a cased vocabulary, after writing JSON files beside it."""

    def write(name="vocab.txt", **files):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        for stem, content in files.items():
            (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / name).write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
        return folder / name

    return write


def split(tokenizer, text="The fox"):
    return tokenizer.decode(tokenizer.encode_batch([text])[0]).split()


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(("lowers", "expected"), [(True, LOWER), (False, CASED), (None, LOWER)])
def test_the_case_of_the_config_beside_it(vocab, lowers, expected, as_folder):
    path = vocab(tokenizer_config={"do_lower_case": lowers, "tokenizer_class": "BertTokenizer"})
    tokenizer = Tokenizer.load(path.parent if as_folder else path)
    assert split(tokenizer) == expected
    assert Tokenizer.from_json(tokenizer.to_json()).lowercase == (expected == LOWER)


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("vocab.txt", {"config": {"do_lower_case": False}}, CASED),
        ("vocab.txt", {"config": {"hidden_size": 4}}, LOWER),
        ("bert-base-cased-vocab.txt", {}, CASED),
        ("bert-base-uncased-vocab.txt", {}, LOWER),
        ("multi_cased_L-12_H-768-vocab.txt", {}, CASED),
        ("bert-base-cased-vocab.txt", {"tokenizer_config": {"do_lower_case": True}}, LOWER),
        ("my-vocab.txt", {"my-tokenizer_config": {"do_lower_case": False}}, CASED),
        (
            "my-vocab.txt",
            {
                "my-tokenizer_config": {"do_lower_case": False},
                "tokenizer_config": {"do_lower_case": True},
            },
            CASED,
        ),
    ],
)
def test_other_signs_of_the_case(vocab, name, files, expected):
    path = vocab(name, **files)
    assert split(Tokenizer.load(path)) == expected
    assert split(Tokenizer.load(path.parent)) == expected


def test_the_name_of_the_folder(vocab):
    path = vocab()
    cased = path.parent.rename(path.parent.parent / "cased_L-12_H-768_A-12")
    assert split(Tokenizer.load(cased)) == CASED


def test_other_options_of_the_normalizer(vocab):
    plain = Tokenizer.load(vocab())
    assert split(plain, "café") == ["cafe"]
    assert split(plain, "日本") == ["日", "[UNK]"]
    config = {"strip_accents": False, "tokenize_chinese_chars": False}
    kept = Tokenizer.load(vocab(tokenizer_config=config))
    assert split(kept, "Café") == ["café"]
    assert split(kept, "日本") == ["日本"]


def test_byte_order_marks_and_windows_line_ends(vocab, tmp_path):
    path = vocab(tokenizer_config={"do_lower_case": False})
    expected = Tokenizer.load(path).to_json()
    for file in path.parent.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(path).to_json() == expected
    whole = tmp_path / "tokenizer.json"
    whole.write_bytes(b"\xef\xbb\xbf" + expected.encode())
    assert Tokenizer.load(whole).to_json() == expected
    bpe = tmp_path / "bpe"
    bpe.mkdir()
    first = Tokenizer.load(write_files(bpe, gpt2_vocab(["</s>"])))
    for file in bpe.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Tokenizer.load(bpe).to_json() == first.to_json()


def test_an_asked_case_wins_and_says_so(vocab, make_config, caplog):
    config = make_config()
    config.data.tokenizer.file = str(vocab(tokenizer_config={"do_lower_case": False}))
    assert config.data.tokenizer.lowercase is None
    assert split(build_tokenizer(config.data)) == CASED
    assert not caplog.records
    override(config, ["--config.data.tokenizer.lowercase=True"])
    assert split(build_tokenizer(config.data)) == LOWER
    (warning,) = caplog.messages
    assert "tokenizer_config.json" in warning


def test_capitals_without_a_word_about_case_are_mentioned(vocab, caplog):
    with caplog.at_level(logging.WARNING):
        assert split(Tokenizer.load(vocab())) == LOWER
    (warning,) = caplog.messages
    assert "'The'" in warning
    caplog.clear()
    Tokenizer.load(vocab(), lowercase=True)
    Tokenizer.load(vocab(config={"do_lower_case": True}))
    assert not caplog.records


def test_a_whole_tokenizer_follows_the_config_beside_it_but_no_option(vocab, make_config):
    path = vocab()
    content = Tokenizer.load(path, lowercase=True).to_json()
    path.with_name("tokenizer.json").write_text(content)
    assert split(Tokenizer.load(path.parent)) == LOWER
    config = make_config()
    config.data.tokenizer.file = str(path.parent)
    config.data.tokenizer.lowercase = False
    with pytest.raises(UserError, match=r"lowercase to be unset or True as in .*, found False"):
        build_tokenizer(config.data)
    vocab(tokenizer_config={"do_lower_case": False})
    assert split(build_tokenizer(config.data)) == CASED


@pytest.mark.parametrize("form", ["added_tokens", "added_tokens_decoder"])
def test_added_tokens_have_their_ids(vocab, form):
    token = len(PIECES)
    if form == "added_tokens":
        files = {"added_tokens": {"<name>": token + 1, "<tag>": token}}
        files["special_tokens_map"] = {"additional_special_tokens": ["<tag>"]}
    else:
        decoder = {
            str(token): {"content": "<tag>", "special": True},
            str(token + 1): {"content": "<name>", "normalized": False},
        }
        files = {"tokenizer_config": {"added_tokens_decoder": decoder}}
    tokenizer = Tokenizer.load(vocab(**files))
    assert tokenizer.vocab_size == token + 2
    assert tokenizer.encode_batch(["fox <name>"])[0][-1] == token + 1
    assert (
        token not in tokenizer.encode_batch(["<tag>"])[0]
    )  # a special one, which text only spells
    assert Tokenizer.from_json(tokenizer.to_json()).same_ids(tokenizer)
    with pytest.raises(UserError, match=r"ids that follow its own, found '<x>' as 99 instead of"):
        Tokenizer.load(vocab(added_tokens={"<x>": 99}, tokenizer_config={}))


def test_a_byte_level_bpe_begins_and_spaces_as_its_files_say(tmp_path):
    vocab = gpt2_vocab(["<s>", "</s>", "<|endoftext|>"])
    folder = write_files(tmp_path, vocab)
    assert Tokenizer.load(folder).prefix_ids == (vocab["</s>"],)
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert Tokenizer.load(folder).prefix_ids == (vocab["<s>"],)
    config = {"bos_token": "<|endoftext|>", "add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    for again in (tokenizer, Tokenizer.from_json(tokenizer.to_json())):
        assert again.prefix_ids == (vocab["<|endoftext|>"],)
        assert again.encode_batch(["low"]) == [[vocab["Ġlow"]]]
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<begin>"}')
    with pytest.raises(UserError, match=r"the bos_token '<begin>' .* found it nowhere"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{", r"expected JSON in .*tokenizer_config\.json"),
        ("[1]", r"a JSON object in .*tokenizer_config\.json, found \[1\]"),
        ('{"do_lower_case": "false"}', 'true or false for do_lower_case in .*, found "false"'),
        ('{"word_tokenizer_type": "mecab"}', 'word_tokenizer_type="basic" in .*, found "mecab"'),
        ('{"do_basic_tokenize": false}', "do_basic_tokenize=true in .*, found false"),
        (
            '{"added_tokens_decoder": {"y": {"content": "z"}}}',
            "tokens by id in added_tokens_decoder",
        ),
        ('{"added_tokens_decoder": {"5": "special"}}', 'added_tokens_decoder .*found "special"'),
        ('{"added_tokens_decoder": [7]}', r"by id in added_tokens_decoder .*found \[7\]"),
    ],
)
def test_files_that_say_what_cannot_be(vocab, content, pattern):
    path = vocab()
    path.with_name("tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=pattern) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_a_run_that_lower_cased_a_cased_vocabulary_goes_on(vocab, make_config, caplog):
    config = make_config(files="gone.txt")
    path = vocab(tokenizer_config={"do_lower_case": False, "strip_accents": False})
    config.data.tokenizer.file = str(path)
    old = Tokenizer.load(path, lowercase=True, beside=False)  # as before such files were read
    assets = {"tokenizer": json.loads(old.to_json())}
    stored = json.loads(to_json(config))
    stored["data"]["tokenizer"]["lowercase"] = True
    for given in (config, from_dict({**json.loads(to_json(config)), **stored})):
        assert split(make_task(given, assets).tokenizer) == LOWER
        assert str(path) in caplog.messages[-1]
        caplog.clear()
    config.data.tokenizer.lowercase = False
    with pytest.raises(UserError, match="to be the tokenizer of the checkpoint"):
        make_task(config, assets)
