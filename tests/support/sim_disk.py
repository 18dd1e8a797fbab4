"""A file system in memory that remembers what is durable, and what a crash may leave of the rest.

Every effect goes into a log. `Crashes` walks the log and, between any two effects, makes images: `killed` (the
process died, everything is there) and `powerless` (of what was not synced, any 512-byte atoms, any names up to some
point of a directory's changes).
"""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple, TypeVar

from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.aligned import AlignedMemory
from sheepdog.cluster.host.disk import Disk, FileInfo, Space
from sheepdog.cluster.host.kernel_sync import KERNEL_SYNCS
from sheepdog.cluster.host.workers import THREADS, Synced, write_and_sync

ATOM = 512
_T = TypeVar("_T")


class Inode:
    """A file's bytes as the running system sees them. `number` is the same in every image."""

    def __init__(self, number: int, data: bytes = b"") -> None:
        self.number = number
        self.data = bytearray(data)


class Write(NamedTuple):
    inode: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    inode: int
    length: int


class Sync(NamedTuple):
    inode: int


class Name(NamedTuple):
    """`new` names the inode (0: nothing) from now on; `old` goes at the same instant ("" none)."""

    directory: str
    new: str
    inode: int
    old: str


class SyncDirectory(NamedTuple):
    directory: str


Effect = Write | Truncate | Sync | Name | SyncDirectory


class SimDisk:
    """`host.disk.Disk` in memory."""

    def __init__(self, seed: int = 0, miss_rate: float = 0.0, direct: bool = True) -> None:
        """`direct`: it takes writes around the page cache."""
        self._direct = direct
        self.log: list[Effect] = []
        self.names: dict[str, Inode] = {}
        self.directories: dict[str, None] = {"/": None}
        self.free = 1 << 40
        self._random = random.Random(seed)
        self._miss_rate = miss_rate
        self._open: dict[int, Inode] = {}
        self._next_fd = 3
        self._next_inode = 1

    # Calls of the port

    def open(self, path: str, flags: int) -> int:
        inode = self.names.get(path)
        if inode is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            if os.path.dirname(path) not in self.directories:
                raise _error(errno.ENOENT, path)
            inode = Inode(self._next_inode)
            self._next_inode += 1
            self.names[path] = inode
            self.log.append(Name(os.path.dirname(path), path, inode.number, ""))
        elif flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        if flags & os.O_TRUNC and inode.data:
            del inode.data[:]
            self.log.append(Truncate(inode.number, 0))
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = inode
        return fd

    def open_cached(self, path: str, flags: int) -> int:
        if self._random.random() < self._miss_rate:
            raise BlockingIOError
        return self.open(path, flags)

    def open_direct(self, path: str) -> int:
        return self.open(path, os.O_WRONLY) if self._direct else -1

    def close(self, fd: int, /) -> None:
        del self._open[fd]

    def info(self, fd: int) -> FileInfo:
        data = self._open[fd].data
        used = sum(1 for start in range(0, len(data), 4096) if not _is_zero(data[start : start + 4096]))
        return FileInfo(len(data), used * 4096)

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, /) -> int:
        data = self._open[fd].data
        start = offset
        for buffer in buffers:
            part = data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    def preadv_cached(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        if self._random.random() < self._miss_rate:
            raise BlockingIOError
        return self.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        content = bytes(data)
        inode = self._open[fd]
        if len(inode.data) < offset:
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(content)] = content
        self.log.append(Write(inode.number, offset, content))
        return len(content)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int:
        return self.pwrite(fd, b"".join(buffers), offset)

    def drop_cached(self, fd: int, offset: int, length: int) -> None:
        pass

    def is_hole(self, fd: int, offset: int, length: int) -> bool:
        return _is_zero(self._open[fd].data[offset : offset + length])

    def written_from_start(self, fd: int) -> int:
        return 0  # so that the zeros are written, which crashes may cut

    def punch(self, fd: int, offset: int, length: int) -> None:
        inode = self._open[fd]
        end = min(offset + length, len(inode.data))
        if end > offset:
            self.pwrite(fd, bytes(end - offset), offset)

    def allocate(self, fd: int, length: int) -> None:
        if len(self._open[fd].data) < length:
            self.truncate(fd, length)

    def truncate(self, fd: int, length: int, /) -> None:
        inode = self._open[fd]
        _resize(inode.data, length)
        self.log.append(Truncate(inode.number, length))

    def fdatasync(self, fd: int, /) -> None:
        self.log.append(Sync(self._open[fd].number))

    def sync_directory(self, path: str) -> None:
        self.log.append(SyncDirectory(path))

    def sync_filesystem(self, path: str) -> None:
        for inode in self.names.values():
            self.log.append(Sync(inode.number))
        for directory in self.directories:
            self.log.append(SyncDirectory(directory))

    def rename(self, old: str, new: str, /) -> None:
        inode = self.names.pop(old, None)
        if inode is None:
            raise _error(errno.ENOENT, old)
        self.names[new] = inode
        self.log.append(Name(os.path.dirname(new), new, inode.number, old))

    def unlink(self, path: str, /) -> None:
        if self.names.pop(path, None) is None:
            raise _error(errno.ENOENT, path)
        self.log.append(Name(os.path.dirname(path), path, 0, ""))

    def mkdir(self, path: str) -> None:
        if os.path.dirname(path) not in self.directories:
            raise _error(errno.ENOENT, path)
        self.directories[path] = None

    def listdir(self, path: str, /) -> list[str]:
        return [os.path.basename(name) for name in self.names if os.path.dirname(name) == path]

    def space(self, path: str) -> Space:
        return Space(1 << 40, self.free)


class Crashes:
    """State of a `SimDisk` after each effect of its log, and the images a crash may leave there."""

    def __init__(self, log: list[Effect], directories: dict[str, None], start: SimDisk | None = None) -> None:
        """`start`: what was durable before the log's first effect."""
        self._log = log
        self._directories = directories
        self.position = 0
        names = {} if start is None else start.names
        self._names = {path: inode.number for path, inode in names.items()}
        self._data = {inode.number: bytearray(inode.data) for inode in names.values()}  # durable bytes
        self._pending: dict[int, list[Write | Truncate]] = {}
        self._pending_names: dict[str, list[Name]] = {}

    def advance(self) -> None:
        """Goes behind the next effect."""
        effect = self._log[self.position]
        self.position += 1
        if isinstance(effect, (Write, Truncate)):
            self._pending.setdefault(effect.inode, []).append(effect)
        elif isinstance(effect, Sync):
            for change in self._pending.pop(effect.inode, ()):
                _apply(self._data.setdefault(effect.inode, bytearray()), change)
        elif isinstance(effect, Name):
            self._pending_names.setdefault(effect.directory, []).append(effect)
        else:
            for name in self._pending_names.pop(effect.directory, ()):
                _rename(self._names, name)

    def killed(self) -> SimDisk:
        """The image of a process that was killed."""
        return self._image(lambda inode: [(change, None) for change in self._pending.get(inode, ())], None)

    def powerless(self, rng: random.Random) -> SimDisk:
        """An image of a power failure: subsets of what was not synced."""
        keep_rate = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))

        def chosen(inode: int) -> list[tuple[Write | Truncate, list[bool] | None]]:
            changes: list[tuple[Write | Truncate, list[bool] | None]] = []
            for change in self._pending.get(inode, ()):
                if isinstance(change, Write):
                    changes.append((change, [rng.random() < keep_rate for _ in range(_atom_count(change))]))
                elif rng.random() < keep_rate:
                    changes.append((change, None))
            return changes

        return self._image(chosen, lambda directory: rng.randint(0, len(self._pending_names[directory])))

    def synced(self) -> SimDisk:
        """The image of a power failure that takes all that was not synced."""
        return self._image(lambda inode: [], lambda directory: 0)

    def every_subset(self, limit: int) -> Iterator[SimDisk]:
        """All images that a power failure may leave here, with every atom there or not; none if there are more than
        `limit`: then, if they are few enough, those with every write there or not as a whole."""
        named = set(self._names.values())
        for changes in self._pending_names.values():
            named.update(name.inode for name in changes)
        inodes = [inode for inode in self._pending if inode in named]
        sizes = [_atom_count(change) for inode in inodes for change in self._pending[inode]]
        prefixes = [range(len(changes) + 1) for changes in self._pending_names.values()]
        for parts in (sizes, [1] * len(sizes)):
            if prod(map(len, prefixes)) << sum(parts) <= limit:
                break
        else:
            return
        for prefix in product(*prefixes):
            lengths = dict(zip(self._pending_names, prefix, strict=True))
            for flags in product((False, True), repeat=sum(parts)):
                kept = iter(flags)
                atoms = [
                    [next(kept)] * size if part == 1 else [next(kept) for _ in range(size)]
                    for part, size in zip(parts, sizes, strict=True)
                ]
                yield self._subset(inodes, iter(atoms), lengths)

    def _subset(self, inodes: list[int], atoms: Iterator[list[bool]], lengths: dict[str, int]) -> SimDisk:
        changes = {
            inode: [
                (change, kept if isinstance(change, Write) else None)
                for change in self._pending[inode]
                if any(kept := next(atoms))
            ]
            for inode in inodes
        }
        return self._image(lambda inode: changes.get(inode, []), lengths.__getitem__)

    def _image(
        self,
        chosen: Callable[[int], list[tuple[Write | Truncate, list[bool] | None]]],
        prefix: Callable[[str], int] | None,
    ) -> SimDisk:
        """`prefix` of a directory: so many of its changes are there; None: all, in the order of all directories."""
        names = dict(self._names)
        if prefix is None:
            for effect in self._log[: self.position]:  # in the order of all directories
                if isinstance(effect, Name) and effect in self._pending_names.get(effect.directory, ()):
                    _rename(names, effect)
        else:
            for directory, changes in self._pending_names.items():
                for name in changes[: prefix(directory)]:
                    _rename(names, name)
        image = SimDisk(self.position)
        image.directories = dict(self._directories)
        inodes: dict[int, Inode] = {}
        for path, number in names.items():
            inode = inodes.get(number)
            if inode is None:
                inode = inodes[number] = Inode(number, bytes(self._data.get(number, b"")))
                for change, atoms in chosen(number):
                    _apply(inode.data, change, atoms)
            image.names[path] = inode
        image._next_inode = max(inodes, default=0) + 1
        return image


def _apply(data: bytearray, change: Write | Truncate, atoms: list[bool] | None = None) -> None:
    if isinstance(change, Truncate):
        _resize(data, change.length)
        return
    for start, stop, index in _atoms(change.offset, len(change.data)):
        if atoms is None or atoms[index]:
            if len(data) < start:
                data.extend(bytes(start - len(data)))
            data[start:stop] = change.data[start - change.offset : stop - change.offset]


def _atom_count(change: Write | Truncate) -> int:
    return (change.offset % ATOM + len(change.data) + ATOM - 1) // ATOM if isinstance(change, Write) else 1


def _atoms(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    start, index = offset, 0
    while start < offset + length:
        stop = min((start // ATOM + 1) * ATOM, offset + length)
        yield start, stop, index
        start, index = stop, index + 1


def _rename(names: dict[str, int], name: Name) -> None:
    if name.old:
        names.pop(name.old, None)
    if name.inode:
        names[name.new] = name.inode
    else:
        names.pop(name.new, None)


def _is_zero(data: bytearray) -> bool:
    return data == bytes(len(data))


def _resize(data: bytearray, length: int) -> None:
    if len(data) > length:
        del data[length:]
    else:
        data.extend(bytes(length - len(data)))


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


class SimWorkers:
    """Workers without threads: a call runs when `step` chooses it, in any order."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], None], rng: random.Random) -> None:
        self._call_soon = call_soon
        self._random = rng
        self.jobs: deque[Callable[[], None]] = deque()

    def run(self, call: Callable[[], _T], done: Callable[[_T | OSError], None]) -> None:
        def job() -> None:
            result: _T | OSError
            try:
                result = call()
            except OSError as error:
                result = error
            self._call_soon(lambda: done(result))

        self.jobs.append(job)

    def sync(self, disk: Disk, fd: int, done: Callable[[OSError | None], None]) -> None:
        self.run(lambda: disk.fdatasync(fd), done)

    def write_durably(self, disk: Disk, fd: int, memory: AlignedMemory, length: int, offset: int, done: Synced) -> None:
        data = memory.view[:length]
        self.run(lambda: write_and_sync(disk, fd, data, offset), done)

    def step(self) -> bool:
        if not self.jobs:
            return False
        index = self._random.randrange(min(THREADS + KERNEL_SYNCS, len(self.jobs)))  # so many run at a time
        job = self.jobs[index]
        del self.jobs[index]
        job()
        return True

    def stop(self) -> None:
        pass
