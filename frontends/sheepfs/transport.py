"""What lies between the file tree and the kernel: one interface, two bodies (pyfuse3, and /dev/fuse spoken directly).

A transport mounts, turns kernel requests into calls of `FileSystem` and sends the answers. It decides nothing about
names or bytes; the tree knows nothing of FUSE. Every request gets an answer on every path: an unforeseen exception
becomes EIO, because an unanswered request hangs its caller, and then the unmount.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sheepdog.frontends.sheepfs.filesystem import FileSystem

log = logging.getLogger("sheepfs")

FSNAME = "sheepfs"  # first column of /proc/mounts
MAX_REQUEST_BYTES = 1 << 20  # 256 pages: the most that the kernel sends without raising fs.fuse.max_pages_limit
# The kernel's default of 12 requests in flight is the first limit of a volume on a network (10.3k instead of 3.9k
# writes a second at 2 ms each with 64), ahead of the CPU. 128 one-megabyte requests are also all the memory they take.
MAX_BACKGROUND = 128
CONGESTION_THRESHOLD = 96  # three quarters, the kernel's own proportion

BLOCK_SIZE = 4096  # st_blksize: granularity of discards that a loop device takes from it
NAME_MAX = 255  # bytes of one file name, as the kernel limits it


class MountError(Exception):
    """The file system could not be mounted. The text is for people."""


@dataclass(slots=True)
class Attributes:
    """What `stat` shows, and for how long the kernel may remember it and the name it was found by."""

    inode: int
    mode: int
    size: int
    links: int = 1
    blocks: int = 0  # of 512 bytes, allocated
    mtime_ns: int = 0
    attribute_seconds: int = 0
    entry_seconds: int = 0


@dataclass(slots=True)
class Opened:
    """An open file. `direct`: bytes pass by the page cache; else it may keep them until the next open."""

    handle: int
    direct: bool


@dataclass(frozen=True, slots=True)
class MountOptions:
    mountpoint: str  # absolute
    debug: bool = False  # log every request


class Transport(Protocol):
    """One mount. `mount`, `serve` and `close` are called once each, in this order; `mount` before the daemon forks."""

    name: str

    def mount(self, options: MountOptions) -> None:
        """Mount; accesses wait until `serve` runs. Raises `MountError`."""

    async def serve(self, files: FileSystem) -> None:
        """Answer requests until the kernel has unmounted or `stop` was called."""

    def stop(self) -> None:
        """Make `serve` return soon. Callable from a signal handler of the loop."""

    def close(self) -> None:
        """Unmount if still mounted and free the connection."""


def error(code: int) -> OSError:
    """The exception that makes a request fail with this errno."""
    return OSError(code, os.strerror(code))


def errno_of(problem: BaseException) -> int:
    """The errno that answers a request that ended with this exception. What nobody foresaw is logged and is EIO."""
    if isinstance(problem, OSError) and problem.errno:
        return problem.errno
    log.error("request failed: %s", problem, exc_info=problem)
    return errno.EIO
