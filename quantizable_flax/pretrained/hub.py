"""The Hugging Face hub: a model's folder by its name, and what may go wrong then."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.files import READERS
from quantizable_flax.pretrained.opening import first_line

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CONFIG = ["*.json", "*.txt", "*.model", "1_Pooling/*"]  # configurations, tokenizers, sentences
_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"])
_OTHERS = ["onnx/*", "openvino/*", "tf_*", "*checkpoint-*/*"]


def resolve(path_or_name: str) -> Path:
    """Returns the folder of a model, which is fetched into the hub's cache if it is not local.

    Of the hub, configurations, tokenizers and weights are fetched: safetensors, or where there are
    none pytorch_model.bin.

    Args:
      path_or_name: a folder or file that is there; else a name of the hub, `org/name` or
        `org/name@revision`, where a revision is a branch, a tag or a commit.

    Raises:
      UserError: neither; a model, or a revision, that the hub does not have or does not give; no
        network and nothing in the cache; or huggingface_hub is not installed.
    """
    path = os.path.expanduser(path_or_name)
    if os.path.exists(path):
        return Path(path)
    name, _, revision = path_or_name.partition("@")
    if not _NAME.fullmatch(name) or name.startswith(".") or Path(name).suffix in READERS:
        raise UserError(
            f"expected a folder, a file or the name of a model on the Hugging Face hub (org/name), "
            f"found {path_or_name!r}, which is none of them; correct it"
        )
    return _fetched(name, revision or None)


def _fetched(name: str, revision: str | None) -> Path:
    """Returns the folder of a model in the cache of the hub, brought up to date."""
    hub = _library()
    told = f"{name}@{revision}" if revision else name
    try:
        for weights in _WEIGHTS:  # the others would double what is fetched
            folder = _snapshot(hub, name, revision, _CONFIG + weights)
            if any(folder.glob(weights[0])):
                break
    except Exception as error:  # its own, those of HTTP, of validation and of the system
        raise _explained(hub, told, error) from None
    return folder


def _snapshot(hub: Any, name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(
            hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHERS
            )
        )
    except hub.errors.LocalEntryNotFoundError as error:
        # No network, and not all of it in the cache: others fetch less, which may be enough.
        if folder := getattr(error, "snapshot_path", None):
            return Path(folder)
        raise


def _explained(hub: Any, name: str, error: Exception) -> UserError:
    errors = hub.errors
    start, reason = f"expected the model {name} ", first_line(error)
    if isinstance(error, errors.GatedRepoError):  # before the next, of which it is one
        return UserError(
            f"{start}to be open to you on the Hugging Face hub, found it gated; accept its terms "
            "on its page there and run: hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UserError(
            f"{start}in a folder or on the Hugging Face hub, found it in neither; correct the path "
            "or the name, or, where it is private, run: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{start}on the Hugging Face hub, found the model without that revision; name one of "
            "its branches, tags or commits behind the @"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return UserError(
            f"{start}in a folder, in the cache of the Hugging Face hub or on it, found none "
            f"({reason}); correct the path or the name, or fetch it where there is a network and "
            "set HF_HOME to that cache"
        )
    return UserError(
        f"{start}to be fetched from the Hugging Face hub, found {type(error).__name__} ({reason}); "
        "try again later, or fetch it by other means and name its folder"
    )


def _library() -> Any:
    """Returns the package huggingface_hub; raises UserError where it is not installed."""
    try:
        import huggingface_hub.errors  # only names of the hub need it
        import huggingface_hub.utils
    except ImportError:
        raise UserError(
            "expected the package huggingface_hub for a model that is no local folder, found it "
            "not installed; run: pip install 'quantizable_flax[interop]', or name a folder"
        ) from None
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub
