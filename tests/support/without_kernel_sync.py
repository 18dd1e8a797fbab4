"""python -m tests.support.without_kernel_sync COMMAND...: runs it where the kernel has no io_setup(2).

Then threads of a sheep sync its files, one call for each: those of one file can be met by it alone (errors.Injection).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

from sheepdog.cluster.host.kernel_sync import ALL_CALLS

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # of <linux/filter.h>
_ERRNO, _ALLOW = 0x00050000 | errno.ENOSYS, 0x7FFF0000


def refuse(call: int) -> None:
    """This process and its children have no such system call from now on (seccomp(2)); OSError."""
    instructions = ((_LOAD, 0, 0, 0), (_IF_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ERRNO), (_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


if __name__ == "__main__":
    refuse(ALL_CALLS[platform.machine()][0])
    os.execv(sys.argv[1], sys.argv[1:])
