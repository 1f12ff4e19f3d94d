"""Compiled programs are kept for the next start of a command line."""

import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax

from quantizable_flax.data.cache import cache_key, user_cache_dir

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_BYTES = 4 * 2**30  # then JAX removes what was not used for longest


def use_compilation_cache() -> None:
    """Lets JAX keep what took it a second or more to compile, in the user's cache folder.

    For command lines alone: whoever imports this package decides for himself. Nothing changes where
    JAX has been told, by JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if _config("compilation_cache_dir") is not None or FOLDER_VARIABLE in os.environ:
        return
    if not _config("enable_compilation_cache"):
        return
    folder = user_cache_dir() / "xla" / _processor()
    try:
        # For us alone: what lies there is run.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        logger.warning(
            "compiled programs are not kept for the next start, %s cannot be written (%s).",
            *(folder, error.strerror or error),
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _config("compilation_cache_max_size") == -1:  # nobody has set it
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def _config(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def _processor() -> str:
    """A name for the processor: programs made for one may not run on another that shares a home.

    JAX tells platforms and kinds of accelerators apart, but not what instructions a CPU has.
    """
    kind = {"machine": platform.machine(), "processor": platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("vendor_id", "model name", "flags", "Features", "CPU part"):
            kind[name.strip()] = value.strip()
    return cache_key(kind)[:16]
