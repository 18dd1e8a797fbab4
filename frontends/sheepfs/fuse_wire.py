"""The kernel's FUSE protocol, version 7: numbers and layouts, as <linux/fuse.h> gives them. No I/O.

Every request is a header and a body, every answer a header and a body; integers in the machine's byte order.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum, IntFlag
from struct import Struct

from sheepdog.frontends.sheepfs.transport import BLOCK_SIZE, NAME_MAX, Attributes

MAJOR = 7
MINOR = 38  # newest that is used here; both sides speak the older of the two
MINOR_MINIMUM = 23  # the answer to INIT has had its size since then

IN_HEADER = Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extension length, padding
OUT_HEADER = Struct("=IiQ")  # length, negative errno, unique
IN_SIZE, OUT_SIZE = IN_HEADER.size, OUT_HEADER.size

INIT_IN = Struct("=IIIII")  # major, minor, max_readahead, flags, flags2 (absent before 7.36)
INIT_OUT = Struct("=IIIIHHIIHHII24x")
READ_IN = Struct("=QQIIQII")  # handle, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = Struct("=QQIIQII")  # handle, offset, size, write_flags, lock_owner, flags, padding
WRITE_OUT = Struct("=II")
OPEN_IN = Struct("=II")  # flags, open_flags
OPEN_OUT = Struct("=QII")  # handle, open_flags, backing_id
HANDLE_IN = Struct("=Q")  # first field of RELEASE, RELEASEDIR, FSYNC, FLUSH
SETATTR_IN = Struct("=IIQQ")  # valid, padding, handle, size; owners, modes and times follow
FALLOCATE_IN = Struct("=QQQII")  # handle, offset, length, mode, padding
LSEEK_IN = Struct("=QQII")  # handle, offset, whence, padding
LSEEK_OUT = Struct("=Q")
GETXATTR_IN = Struct("=II")  # room for the value, padding; the name follows
GETXATTR_OUT = Struct("=II")
SETXATTR_IN = Struct("=II")  # length of the value, flags; name and value follow
MKDIR_IN = Struct("=II")  # mode, umask; the name follows
STATFS_OUT = Struct("=QQQQQIIII24x")
ATTRIBUTES = Struct("=QQQQQQIIIIIIIIII")
ENTRY = Struct("=QQQQII")  # node, generation, entry and attribute seconds, their nanoseconds; attributes follow
ATTRIBUTES_OUT = Struct("=QII")  # seconds, nanoseconds, padding; attributes follow
DIRECTORY_ENTRY = Struct("=QQII")  # inode, cookie, length of the name, kind; the name follows, padded to 8


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Init(IntFlag):
    """What both sides can. The upper half travels in flags2."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36


WANTED = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.INIT_EXT
    | Init.DIRECT_IO_ALLOW_MMAP
)


class Open(IntFlag):
    """Answer of OPEN."""

    DIRECT_IO = 1 << 0
    NOFLUSH = 1 << 5  # no FLUSH at every close: it would do nothing
    PARALLEL_DIRECT_WRITES = 1 << 6  # writers of one file need not wait for each other


class Falloc(IntFlag):
    """Modes of fallocate(2)."""

    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    ZERO_RANGE = 16


SEEK_DATA, SEEK_HOLE = 3, 4
SETATTR_SIZE = 1 << 3

# f_bsize. A loop device takes it as the granularity of discards: smaller ones would free nothing (an object is the
# unit) and cost a write of zeros. Not st_blksize, which programs take as the size of their buffers.
DISCARD_BYTES = 4 << 20


def attributes(found: Attributes, owner: tuple[int, int]) -> bytes:
    seconds, nanoseconds = divmod(found.mtime_ns, 1_000_000_000)
    return ATTRIBUTES.pack(
        found.inode, found.size, found.blocks,
        seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds,
        found.mode, found.links, *owner, 0, BLOCK_SIZE, 0,
    )  # fmt: skip


def entry(found: Attributes, owner: tuple[int, int]) -> bytes:
    """Answer of LOOKUP."""
    head = ENTRY.pack(found.inode, 0, found.entry_seconds, found.attribute_seconds, 0, 0)
    return head + attributes(found, owner)


def attributes_answer(found: Attributes, owner: tuple[int, int]) -> bytes:
    """Answer of GETATTR and SETATTR."""
    return ATTRIBUTES_OUT.pack(found.attribute_seconds, 0, 0) + attributes(found, owner)


def directory_entry(name: bytes, inode: int, cookie: int, mode: int) -> bytes:
    head = DIRECTORY_ENTRY.pack(inode, cookie, len(name), mode >> 12)
    return head + name + bytes(-len(name) % 8)


def statfs_answer() -> bytes:
    return STATFS_OUT.pack(0, 0, 0, 0, 0, DISCARD_BYTES, NAME_MAX, BLOCK_SIZE, 0)


def init_answer(
    minor: int, readahead: int, offered: int, background: int, congestion: int, max_write: int
) -> tuple[bytes, Init]:
    """Answer of INIT, and what was agreed."""
    agreed = Init(WANTED & offered)
    answer = INIT_OUT.pack(
        MAJOR, min(minor, MINOR), readahead, agreed & 0xFFFFFFFF, background, congestion, max_write,
        1, max_write // 4096, 0, agreed >> 32, 0,
    )  # fmt: skip
    return answer, agreed


def sized_answer(value: bytes, room: int) -> bytes:
    """Answer of GETXATTR and LISTXATTR: the length when asked with no room, ERANGE when the room is too small."""
    if not room:
        return GETXATTR_OUT.pack(len(value), 0)
    if len(value) > room:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def name_of(body: memoryview) -> bytes:
    """A name that ends with a zero byte."""
    return bytes(body).partition(b"\0")[0]
