"""The corpus that every Python carries: the language reference topics and the docstrings."""

import ast
import functools
import importlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_DOCSTRING_CHARS = 40
# Third-party code and test fixtures: the first is not the interpreter's, the second not English.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def embedded_documents() -> tuple[str, ...]:
    """Returns one document per reference topic, then one per standard-library module.

    About 2.2 MB of English that need no network. The order and the text depend on the
    interpreter alone. Modules are parsed, never imported; a docstring counts once.
    """
    return tuple(dict.fromkeys([*_topics(), *_module_documents(_stdlib())]))


def embedded_description() -> dict:
    """Returns what decides the corpus, for cache keys."""
    return {"source": "embedded", "python": sys.version, "stdlib": str(_stdlib())}


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # Trimmed distributions leave the package out.
        return []
    return [text.strip() for _, text in sorted(topics.items())]


def _module_documents(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if _SKIPPED.isdisjoint(name.split("/")):
            fresh = dict.fromkeys(text for text in _docstrings(paths[name]) if text not in seen)
            seen.update(fresh)
            if fresh:
                yield "\n".join(fresh)


def _docstrings(path: Path) -> list[str]:
    """Returns the docstrings of one file in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in others' docstrings.
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [(ast.get_docstring(node) or "").strip() for node in nodes]
    # Escapes in a docstring can spell lone surrogates, which no tokenizer takes.
    return [
        text.encode("utf-8", "replace").decode("utf-8")
        for text in texts
        if len(text) >= MIN_DOCSTRING_CHARS
    ]
