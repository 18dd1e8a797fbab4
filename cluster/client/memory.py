"""Staying clear of the loop "no memory -> the kernel writes back a volume -> its server needs memory".

For the servers of volumes that the kernel of their own host uses: sheepfs under a loop device, nbdkit under /dev/nbd0.
What the kernel writes back to get memory must not itself wait for memory, or for code that was thrown out of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
MADV_POPULATE_READ = 22  # Linux 5.14
PR_SET_IO_FLUSHER = 57  # Linux 5.6: allocations of this process do not wait for block writes
CAP_IPC_LOCK = 14
NEVER_KILL = "-1000"


def lock_memory() -> None:
    """Code and what is in use stay in memory; everything else from its first use on. OSError where that is refused.

    What is only reserved is not filled, as mlockall without ONFAULT fills it: nbdkit 1.32 has 192 MiB of that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for begin, end in _mapped_files():
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)  # else: when first used
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        number = ctypes.get_errno()
        raise OSError(number, f"the server cannot be locked into memory: {os.strerror(number)}")


def write_back_for_the_kernel(told: Callable[[str], object]) -> None:
    """Allocate as an I/O flusher, refuse to be killed for lack of memory. `told` hears what is not permitted.

    For the threads that the caller makes from now on, too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        told(f"PR_SET_IO_FLUSHER: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text(NEVER_KILL)
    except OSError as problem:
        told(f"oom_score_adj: {problem.strerror}")


def may_lock_all() -> bool:
    """Without the capability a successful `lock_memory` would make later allocations fail at RLIMIT_MEMLOCK."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_IPC_LOCK & 1)
    return False


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses of this program and its libraries, first byte and the one behind the last."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, permissions, _, _, inode, *_ = line.split()
        if inode != "0" and permissions.startswith("r"):
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
