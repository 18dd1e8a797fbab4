"""System calls that the C library has no functions for."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_ARGUMENTS: Final = 5  # most of those called this way take fewer; the kernel looks at no others
# They wait for nothing, or for the kernel alone (io_destroy): the interpreter need not be given up for them.
_call = ctypes.PyDLL(None, use_errno=True).syscall
_call.restype = ctypes.c_long
_call.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * _ARGUMENTS)


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """The result of a call that waits for no thread of ours; OSError.

    Arguments are integers, addresses, or bytes that the kernel reads up to a NUL.
    """
    result = int(_call(number, *arguments, *[None] * (_ARGUMENTS - len(arguments))))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
