"""The command lines keep what they compile, where nobody has told JAX otherwise."""

import jax
import pytest

from quantizable_flax.runtime.compilation_cache import (
    FOLDER_VARIABLE,
    MAX_BYTES,
    use_compilation_cache,
)

KEYS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def untold(monkeypatch, tmp_path):
    """JAX as nobody has configured it, and an empty cache folder of this user."""
    before = {key: getattr(jax.config, key) for key in KEYS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for key, value in before.items():
        jax.config.update(key, value)


def folder() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_programs_go_to_the_users_cache_folder(untold):
    use_compilation_cache()
    (made,) = (untold / "quantizable_flax" / "xla").iterdir()
    assert folder() == str(made)
    assert made.stat().st_mode & 0o077 == 0  # what lies there is run
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES


def test_what_jax_was_told_stays(untold, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    use_compilation_cache()
    assert folder() is None
    monkeypatch.delenv(FOLDER_VARIABLE)
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert folder() is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "mine")
    use_compilation_cache()
    assert folder() == "mine"
    assert list(untold.iterdir()) == []


def test_folder_that_cannot_be_written_is_a_warning(untold, caplog):
    (untold / "quantizable_flax").write_text("in the way")
    use_compilation_cache()
    assert folder() is None
    (warning,) = caplog.messages
    assert str(untold / "quantizable_flax") in warning
    assert "Not a directory" in warning
