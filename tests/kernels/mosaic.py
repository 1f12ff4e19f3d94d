"""Runs kernels of Mosaic GPU on a CPU, by JAX's interpreter, which is taught what it lacks.

It simulates warpgroups, shared memory, barriers and copies, and reports races between them.
"""

import contextlib
import threading

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu import core as mosaic
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    params,
)
from jax._src.state import primitives as state_primitives
from jax._src.state import types

_local = threading.local()


@contextlib.contextmanager
def interpreted(**options):
    """Kernels that are traced within are interpreted."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with (
        params.force_gpu_interpret_mode(params.InterpretGPUParams(**options)),
        _patched(gpu_callbacks, "_get_shared_memory", _shared_memory),
        _patched(gpu_callbacks, "wgmma", _wgmma),
        _patched(jaxpr_interpret.JaxprInterpreter, "interpret", _interpret),
    ):
        yield


@contextlib.contextmanager
def _patched(owner, name, wrapper):
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


class _Operands:
    """Shared memory whose first two reads are the sides of a product.

    Attributes:
      memory: what is read otherwise.
      left: the left side if it lies in registers.
      transposed: whether the right side is to be transposed.
    """

    def __init__(self, memory, left, transposed):
        self.memory, self.left, self.transposed, self.reads = memory, left, transposed, 0

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def get_buffer_content(self, *args, **kwargs):
        self.reads += 1
        if self.reads == 1 and self.left is not None:
            return self.left, None, None
        content, *rest = self.memory.get_buffer_content(*args, **kwargs)
        return (content.T if self.reads == 2 and self.transposed else content, *rest)


def _shared_memory(original):
    operands = getattr(_local, "operands", None)
    return original() if operands is None else _Operands(original(), *operands)


def _wgmma(original, *, a_allocation_key_as_array, a_transforms, b_transforms, **kwargs):
    """The matrix instruction takes its left side from registers, its right side transposed."""
    left, key = None, a_allocation_key_as_array
    transposed = [isinstance(t, types.TransposeTransform) for t in b_transforms]
    b_transforms = tuple(t for t, skip in zip(b_transforms, transposed, strict=True) if not skip)
    if key.ndim != 1:
        left, key, a_transforms = np.asarray(key), kwargs["b_allocation_key_as_array"], b_transforms
    _local.operands = (left, any(transposed))
    try:
        return original(
            a_allocation_key_as_array=key,
            a_transforms=a_transforms,
            b_transforms=b_transforms,
            **kwargs,
        )
    finally:
        _local.operands = None


def _interpret(original, self, jaxpr, *args):
    """JAX 0.10 knows no layouts: a load is then a plain one, a cast does nothing."""
    return original(self, jaxpr.replace(eqns=[_plain(eqn) for eqn in jaxpr.eqns]), *args)


def _plain(eqn):
    if eqn.primitive is primitives.load_p:
        params = {"tree": eqn.params["tree"]}
        return eqn.replace(primitive=state_primitives.get_p, params=params)
    if eqn.primitive is mosaic.layout_cast_p:
        return eqn.replace(primitive=jax.lax.copy_p, params={})
    return eqn
