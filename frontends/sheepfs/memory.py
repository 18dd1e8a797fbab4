"""Staying clear of the loop "no memory -> write back a loop device -> sheepfs needs memory".

A process that serves the block device which the kernel writes back to get memory must not itself wait for memory.
Everything here is best effort: what is not permitted is logged and done without.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sheepdog.frontends.sheepfs.transport import log

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PR_SET_IO_FLUSHER = 57  # Linux 5.6: allocations of this process do not wait for block writes
CAP_IPC_LOCK = 14
NEVER_KILL = "-1000"


def stay_in_memory() -> None:
    """Pin the pages, allocate as an I/O flusher, refuse to be killed for lack of memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Without the capability a successful mlockall would make later allocations fail at RLIMIT_MEMLOCK.
    if _has_capability(CAP_IPC_LOCK):
        # First fault everything in; then pin what comes as it is touched (thread stacks are mostly not).
        _try("mlockall", libc.mlockall(MCL_CURRENT))
        _try("mlockall", libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
    _try("PR_SET_IO_FLUSHER", libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))
    try:
        Path("/proc/self/oom_score_adj").write_text(NEVER_KILL)
    except OSError as problem:
        log.debug("oom_score_adj: %s", problem)


def _try(what: str, result: int) -> None:
    if result:
        log.info("%s: %s", what, os.strerror(ctypes.get_errno()))


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
