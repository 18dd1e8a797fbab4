"""The system calls of the store, behind one port.

`Disk` is everything that the store asks of a file system; `RealDisk` is Linux. A test body with another
`Disk` decides what survives a crash. Errors are `OSError`; the store turns them into its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.system_call import system_call

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE of fallocate(2)
_FILES_LEAST = 4096  # more than are made before the file system is asked again (directory.SPACE_CHECK_BYTES)
_SYNC_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class FileInfo(NamedTuple):
    """Length of a file and what it takes on the disk, in bytes."""

    length: int
    allocated: int


class Space(NamedTuple):
    """Size of a file system and what is free for us, in bytes: none where hardly a file more can be made."""

    total: int
    free: int


class Disk(Protocol):
    """A file system. Paths are absolute. Calls block, so that those that may take long belong into `Workers`."""

    def open(self, path: str, flags: int) -> int:
        """A descriptor; `flags` are those of open(2), new files get mode 0640."""

    def open_cached(self, path: str, flags: int) -> int:
        """Like open of a file that is there, but BlockingIOError when finding it may have to wait for the disk."""

    def open_direct(self, path: str) -> int:
        """A descriptor whose writes go around the page cache, in whole blocks from `AlignedMemory`.

        -1 where the file system has none, or might make who begins one wait for the disk.
        """

    def close(self, fd: int, /) -> None: ...

    def info(self, fd: int) -> FileInfo: ...

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, /) -> int:
        """Fills the buffers; the count is short at the end of the file."""

    def preadv_cached(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        """Like preadv, but only what the page cache holds: a short count or BlockingIOError when more is needed."""

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        """Bytes written, fewer only when the disk is full."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int: ...

    def drop_cached(self, fd: int, offset: int, length: int) -> None:
        """The next read of the range asks the disk; what is not written back yet stays."""

    def is_hole(self, fd: int, offset: int, length: int) -> bool:
        """True when no byte of the range is allocated; False when in doubt."""

    def written_from_start(self, fd: int) -> int:
        """Bytes from the file's beginning that have been written: new ones in their place need no new map of it."""

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Gives the range back; it reads as zeros."""

    def allocate(self, fd: int, length: int) -> None:
        """Makes sure that writes to the first `length` bytes need no more space."""

    def truncate(self, fd: int, length: int, /) -> None: ...

    def fdatasync(self, fd: int, /) -> None: ...

    def sync_directory(self, path: str) -> None:
        """Makes creations, renames and removals in a directory durable."""

    def sync_filesystem(self, path: str) -> None:
        """Makes everything on the file system of `path` durable."""

    def rename(self, old: str, new: str, /) -> None: ...

    def unlink(self, path: str, /) -> None: ...

    def mkdir(self, path: str) -> None:
        """Mode 0750; an existing directory is fine, a missing parent is not."""

    def listdir(self, path: str, /) -> list[str]: ...

    def space(self, path: str) -> Space: ...


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int

# File systems whose io_submit(2) returns before the disk has written; the first word of struct statfs.
_BACKGROUND_WRITERS = (0xEF53, 0x58465342)  # ext4, XFS
_STATUS_BYTES = 256  # of struct statx, and more than struct statfs has
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # Linux 6.1: how memory and offsets are to be aligned, two u32 at 152; 0: no direct writes
_ALIGNMENTS = struct.Struct("=152xII")

_OPENAT2 = 437  # on every machine
_AT_FDCWD = -100
_RESOLVE_CACHED = 0x20  # EAGAIN rather than look on the disk (Linux 5.12)


class _OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class RealDisk:
    """The operating system's file system."""

    close = staticmethod(os.close)
    preadv = staticmethod(os.preadv)
    pwrite = staticmethod(os.pwrite)
    pwritev = staticmethod(os.pwritev)
    truncate = staticmethod(os.ftruncate)
    fdatasync = staticmethod(os.fdatasync)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    listdir = staticmethod(os.listdir)

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o640)

    def open_cached(self, path: str, flags: int) -> int:
        how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
        try:
            return system_call(_OPENAT2, _AT_FDCWD, os.fsencode(path), ctypes.addressof(how), ctypes.sizeof(how))
        except OSError as error:  # an old kernel has other errors; whatever it is, `open` meets it again
            raise BlockingIOError(error.errno, "not in the caches", path) from None

    def open_direct(self, path: str) -> int:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return -1
        if _writes_in_background(fd):
            return fd
        os.close(fd)
        return -1

    def info(self, fd: int) -> FileInfo:
        status = os.fstat(fd)
        return FileInfo(status.st_size, status.st_blocks * 512)

    def preadv_cached(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        try:
            return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return os.preadv(fd, buffers, offset)  # a file system in memory, such as tmpfs

    def drop_cached(self, fd: int, offset: int, length: int) -> None:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def is_hole(self, fd: int, offset: int, length: int) -> bool:
        try:
            return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO  # no data behind `offset`

    def written_from_start(self, fd: int) -> int:
        try:
            return os.lseek(fd, 0, os.SEEK_HOLE)  # what is only allocated counts as a hole
        except OSError as error:
            if error.errno == errno.ENXIO:  # an empty file
                return 0
            raise

    def punch(self, fd: int, offset: int, length: int) -> None:
        if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EOPNOTSUPP:
            raise OSError(code, os.strerror(code))
        zeros = bytes(min(length, 1 << 20))
        for start in range(offset, offset + length, len(zeros)):
            os.pwrite(fd, zeros[: offset + length - start], start)

    def allocate(self, fd: int, length: int) -> None:
        os.posix_fallocate(fd, 0, length)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, _SYNC_FLAGS)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_filesystem(self, path: str) -> None:
        fd = os.open(path, _SYNC_FLAGS)
        try:
            if _libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        finally:
            os.close(fd)

    def mkdir(self, path: str) -> None:
        try:
            os.mkdir(path, 0o750)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def space(self, path: str) -> Space:
        status = os.statvfs(path)
        free = status.f_bavail * status.f_frsize
        # f_files is 0 where the number of files has no limit of its own
        if status.f_files and status.f_favail < min(_FILES_LEAST, status.f_files // 64):
            free = 0
        return Space(status.f_blocks * status.f_frsize, free)


def _writes_in_background(fd: int) -> bool:
    """Whole blocks of a descriptor with O_DIRECT: not where the kernel would copy them all the same (data=journal)."""
    status = ctypes.create_string_buffer(_STATUS_BYTES)
    if _libc.fstatfs(fd, status) != 0 or ctypes.c_long.from_buffer(status).value not in _BACKGROUND_WRITERS:
        return False
    if not hasattr(_libc, "statx") or _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, status) != 0:
        return False
    return all(0 < alignment <= BLOCK_SIZE for alignment in _ALIGNMENTS.unpack_from(status))
