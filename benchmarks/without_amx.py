"""Runs a command to which Linux refuses AMX, to see what a CPU without it would do.

    python -m benchmarks.without_amx python -m benchmarks.serving

A program asks the kernel for AMX's tile registers before it uses them (arch_prctl with
ARCH_REQ_XCOMP_PERM); a seccomp filter answers that call with EPERM. XLA, oneDNN and ONNX Runtime
then take their other kernels, as on such a CPU; clocks and caches stay this one's.
"""

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM = 158, 0x1023  # x86-64
# Berkeley packet filter: (code, jump if true, jump if false, operand).
LOAD, EQUALS, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # 1 is EPERM
FILTER = (
    (LOAD, 0, 0, 0),  # the number of the call
    (EQUALS, 0, 3, ARCH_PRCTL),
    (LOAD, 0, 0, 16),  # its first argument
    (EQUALS, 0, 1, ARCH_REQ_XCOMP_PERM),
    (RETURN, 0, 0, REFUSE),
    (RETURN, 0, 0, ALLOW),
)


class Program(ctypes.Structure):
    """The kernel's `sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_amx() -> None:
    """Filters the calls of this process and of those that it starts, from now on.

    Raises:
      OSError: the kernel does not take the filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in FILTER))
    program = Program(len(FILTER), ctypes.addressof(code))
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])
