"""A disk that is only looked at: what is written to it stays in memory and goes with it.

So the offline tools replay a journal without touching a store that somebody may want to examine as it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.disk import FileInfo, RealDisk, Space

_PAGE: Final = 4096


class _File:
    """A file of the real disk (`fd`, -1: none) with changed pages over it."""

    def __init__(self, path: str, fd: int, length: int, allocated: int) -> None:
        self.path = path
        self.fd = fd
        self.length = length
        self.allocated = allocated
        self.pages: dict[int, bytearray] = {}


class ScratchDisk:
    """`host.disk.Disk` over the real one, copy on write."""

    def __init__(self) -> None:
        self._real = RealDisk()
        self._changed: dict[str, _File | None] = {}  # by path; None: removed
        self._open: dict[int, _File] = {}
        self._next_fd = 1

    def open(self, path: str, flags: int) -> int:
        file = self._changed.get(path)
        if file is None:
            file = self._find(path, flags)
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = file
        if flags & os.O_TRUNC:
            self._change(fd).length = 0
            file.pages.clear()
        return fd

    def _find(self, path: str, flags: int) -> _File:
        if path not in self._changed:
            try:
                fd = self._real.open(path, os.O_RDONLY)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
            else:
                return _File(path, fd, *self._real.info(fd))
        elif not flags & os.O_CREAT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        file = self._changed[path] = _File(path, -1, 0, 0)
        return file

    def open_cached(self, path: str, flags: int) -> int:
        return self.open(path, flags)

    def close(self, fd: int, /) -> None:
        file = self._open.pop(fd)
        if file.fd >= 0 and self._changed.get(file.path) is not file and file not in self._open.values():
            self._real.close(file.fd)

    def _change(self, fd: int) -> _File:
        """The file, which from now on is another than the real disk's."""
        file = self._open[fd]
        if self._changed.get(file.path, file) is file:  # unless the name went to another file meanwhile
            self._changed[file.path] = file
        return file

    def info(self, fd: int) -> FileInfo:
        file = self._open[fd]
        return FileInfo(file.length, file.allocated)

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, /) -> int:
        file = self._open[fd]
        start = offset
        for buffer in buffers:
            length = max(0, min(len(buffer), file.length - offset))
            view = memoryview(buffer)[:length]
            self._fill(file, view, offset)
            offset += length
        return offset - start

    def _fill(self, file: _File, view: memoryview, offset: int) -> None:
        view[:] = bytes(len(view))
        if file.fd >= 0 and len(view):
            self._real.preadv(file.fd, [view], offset)
        for page in range(offset // _PAGE, (offset + len(view) - 1) // _PAGE + 1 if len(view) else 0):
            changed = file.pages.get(page)
            if changed is not None:
                start, stop = max(offset, page * _PAGE), min(offset + len(view), (page + 1) * _PAGE)
                view[start - offset : stop - offset] = changed[start - page * _PAGE : stop - page * _PAGE]

    def preadv_cached(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        return self.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        file = self._change(fd)
        view = memoryview(data)
        end = offset + len(view)
        for page in range(offset // _PAGE, (end - 1) // _PAGE + 1 if view else 0):
            changed = file.pages.get(page)
            if changed is None:
                changed = bytearray(_PAGE)
                available = max(0, min(_PAGE, file.length - page * _PAGE))
                self._fill(file, memoryview(changed)[:available], page * _PAGE)
                file.pages[page] = changed
            start, stop = max(offset, page * _PAGE), min(end, (page + 1) * _PAGE)
            changed[start - page * _PAGE : stop - page * _PAGE] = view[start - offset : stop - offset]
        file.length = max(file.length, end)
        return len(view)

    def open_direct(self, path: str) -> int:
        return -1

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int:
        return self.pwrite(fd, b"".join(buffers), offset)

    def drop_cached(self, fd: int, offset: int, length: int) -> None:
        pass

    def is_hole(self, fd: int, offset: int, length: int) -> bool:
        return False

    def written_from_start(self, fd: int) -> int:
        return self._open[fd].length

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.pwrite(fd, bytes(max(0, min(length, self._open[fd].length - offset))), offset)

    def allocate(self, fd: int, length: int) -> None:
        self._change(fd).length = max(self._open[fd].length, length)

    def truncate(self, fd: int, length: int, /) -> None:
        self._change(fd).length = length

    def fdatasync(self, fd: int, /) -> None:
        pass

    def sync_directory(self, path: str) -> None:
        pass

    def sync_filesystem(self, path: str) -> None:
        pass

    def rename(self, old: str, new: str, /) -> None:
        file = self._changed.get(old) or self._find(old, 0)
        file.path = new
        self._changed[new] = file
        self._changed[old] = None

    def unlink(self, path: str, /) -> None:
        self._changed[path] = None

    def mkdir(self, path: str) -> None:
        if not os.path.isdir(path) and not os.path.isdir(os.path.dirname(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def listdir(self, path: str, /) -> list[str]:
        try:
            names = dict.fromkeys(self._real.listdir(path))
        except FileNotFoundError:
            names = {}
        for changed, file in self._changed.items():
            if os.path.dirname(changed) == path:
                if file is None:
                    names.pop(os.path.basename(changed), None)
                else:
                    names[os.path.basename(changed)] = None
        return list(names)

    def space(self, path: str) -> Space:
        return Space(1 << 60, 1 << 60)
