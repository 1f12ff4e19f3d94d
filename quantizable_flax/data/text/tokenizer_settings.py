"""What the files beside a vocabulary say about its use: case, added tokens, how documents start."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantizable_flax.data.text import subword
from quantizable_flax.errors import UserError

WHOLE, VOCAB_LINES, VOCAB_JSON = "tokenizer.json", "vocab.txt", "vocab.json"
Added = tuple[str, dict[str, bool]]  # a token and how it is matched
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Keys of tokenizer_config.json that are options of BERT's normalizer.
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "clean_text": "clean_text",
}
# What a WordPiece is taken for; others find their words in another way.
_EXPECTED = {
    "do_basic_tokenize": True,
    "word_tokenizer_type": "basic",
    "subword_tokenizer_type": "wordpiece",
    "wordpieces_prefix": "##",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CASED = re.compile(r"(?:^|[-_])(un)?cased(?:[-_.]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a vocabulary is used; what no file says is absent or None.

    Attributes:
      normalizer: options of BERT's normalizer in the usual file.
      lowercase: whether text is lower-cased, as that file says or else another sign.
      case_from: what says so, for messages.
      add_prefix_space: whether a document without a space before it is read as though it had one.
      start: the token that begins documents.
      added: tokens that text is searched for before it is split, by id, with their flags.
    """

    normalizer: dict[str, bool] = dataclasses.field(default_factory=dict)
    lowercase: bool | None = None
    case_from: str | None = None
    add_prefix_space: bool | None = None
    start: str | None = None
    added: dict[int, Added] = dataclasses.field(default_factory=dict)


def read_settings(file: Path, ending: str) -> Settings:
    """Returns what the files beside the vocabulary `file` say about it.

    Args:
      file: the vocabulary; where its name is a prefix before `ending`, theirs may have that too.
      ending: the usual name of such a file, for example vocab.txt.

    Raises:
      UserError: a file beside it that cannot be read, has a value of another type, or asks for
        what is not WordPiece as BERT has it.
    """
    prefix = file.name.removesuffix(ending) if file.name.endswith(ending) else ""

    def beside(name: str) -> Path:
        prefixed = file.with_name(prefix + name)
        return prefixed if prefixed.is_file() else file.with_name(name)

    config, config_file = _content(beside(_CONFIG)), beside(_CONFIG)
    said = {ours: _flag(config, key, config_file) for key, ours in _NORMALIZER.items()}
    lowercase, case_from = said["lowercase"], str(config_file)
    if ending == VOCAB_LINES:  # A tokenizer.json says all of this itself.
        _check_word_piece(config, config_file)
        if lowercase is None:
            lowercase, case_from = _case_elsewhere(file, beside("config.json"))
    special = {**_content(beside(_SPECIAL)), **config}
    return Settings(
        {key: value for key, value in said.items() if value is not None},
        lowercase,
        case_from,
        _flag(config, "add_prefix_space", config_file),
        _token(special.get("bos_token")),
        {**dict(_added(beside(_ADDED), special)), **dict(_decoder(config, config_file))},
    )


def add_tokens(inner: Any, settings: Settings, file: Path) -> None:
    """Adds the tokens that `inner`, of the vocabulary `file`, lacks, under their own ids."""
    for token, (content, flags) in sorted(settings.added.items()):
        subword.add_token(inner, content, **flags)
        if inner.token_to_id(content) != token:
            raise UserError(
                f"expected the added tokens beside {file} to have ids that follow its own, found "
                f"{content!r} as {token} instead of {inner.token_to_id(content)}; "
                "fetch all files from the same place"
            )


def _check_word_piece(config: dict[str, Any], file: Path) -> None:
    for key, expected in _EXPECTED.items():
        if config.get(key, expected) not in (expected, None):
            raise UserError(
                f"expected {key}={json.dumps(expected)} in {file}, found "
                f"{json.dumps(config[key])}, which is not read here; save a tokenizer.json of "
                "this tokenizer and name that"
            )


def _case_elsewhere(file: Path, config: Path) -> tuple[bool | None, str]:
    """Returns whether text is lower-cased where the usual file does not say it, and what does."""
    said = _flag(_content(config), "do_lower_case", config)
    if said is not None:
        return said, str(config)
    for name in (file.name, file.absolute().parent.name):
        match = _CASED.search(name)
        if match:
            return bool(match[1]), f"the name {name}"
    return None, "nothing"


def _content(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, an empty one where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"expected JSON in {file}, which says how the vocabulary beside it is used, found "
            f"'{str(error).splitlines()[0]}'; fetch it again or remove it"
        ) from None
    if not isinstance(content, dict):
        raise _unlike(file, "a JSON object", content)
    return content


def _flag(content: dict[str, Any], key: str, file: Path) -> bool | None:
    value = content.get(key)
    if value is not None and not isinstance(value, bool):
        raise _unlike(file, f"true or false for {key}", value)
    return value


def _token(value: Any) -> str | None:
    """Returns the text of a token, which may stand alone or with how it is matched."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _added(file: Path, special: dict[str, Any]) -> Iterator[tuple[int, Added]]:
    listed = special.get("additional_special_tokens") or ()
    names = {_token(value) for value in (*special.values(), *listed)}
    for content, token in _content(file).items():
        if type(token) is not int:
            raise _unlike(file, f"an id for {content!r}", token)
        yield token, (content, {"normalized": False, "special": content in names})


def _decoder(config: dict[str, Any], file: Path) -> Iterator[tuple[int, Added]]:
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict):
        raise _unlike(file, "tokens by id in added_tokens_decoder", tokens)
    for token, value in tokens.items():
        if not token.isdecimal() or not isinstance(value, dict) or _token(value) is None:
            raise _unlike(file, "tokens by id in added_tokens_decoder", value)
        flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
        yield int(token), (value["content"], flags)


def _unlike(file: Path, expected: str, found: Any) -> UserError:
    shown = json.dumps(found)
    return UserError(
        f"expected {expected} in {file}, found {shown if len(shown) < 80 else type(found)}; "
        "correct it or fetch it again"
    )
