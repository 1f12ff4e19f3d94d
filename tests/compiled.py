"""How many programs JAX compiles meanwhile."""

import contextlib
from collections.abc import Iterator

import jax

# For a search among many local minima, which the last bits of sums decide: not the quickest way
# of the other tests, but that of everybody.
ORDINARY = {"xla_backend_optimization_level": 3}

EVENT = "/jax/core/compile/backend_compile_duration"  # also of a program from the cache on disk


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The list to which the name of each program is added that is compiled within."""
    names: list[str] = []

    def note(event: str, seconds: float, **of: str | int) -> None:
        if event == EVENT:
            names.append(str(of.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
