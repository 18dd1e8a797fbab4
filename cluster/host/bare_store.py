"""The store of a node without its daemon: the copies as a daemon would find them, nothing changed on the disks.

A journal that was not replayed is replayed in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from sheepdog.cluster.core.errors import Corrupt, StoreError, UsageError
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.host import replay, trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory
from sheepdog.cluster.host.journal_scan import Found, scan
from sheepdog.cluster.host.known_disks import KnownDisks
from sheepdog.cluster.host.last_journal import LastJournal
from sheepdog.cluster.host.node_state import DirectoryLock
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.scratch_disk import ScratchDisk
from sheepdog.cluster.host.superblock import DiskIdentity, node_identity, read_disk_identity
from sheepdog.cluster.host.trailer import FIRST_ENTRY
from sheepdog.cluster.host.workers import ThreadWorkers

CHUNK_BYTES: Final = 1 << 20  # read at a time: fast from a disk, small in memory
_WARNING: Final = 4
Say: TypeAlias = Callable[[str], None]


class BareStore:
    """`path` is META[,DISK...] as on the daemon's command line, or the disks alone where META is lost.

    `failures`: what was wrong with the store itself; `orderly`: so its daemon ended.
    """

    def __init__(self, path: str, say: Say, journal_directory: str | None = None) -> None:
        """UsageError when a daemon uses the store, or when there is none; OSError."""
        self.metadata, *disks = path.split(",")
        self._has_metadata = _exists(f"{self.metadata}/superblock")
        if self._has_metadata:
            directories = disks or [f"{self.metadata}/obj"]
        elif _exists(f"{self.metadata}/.disk"):
            directories = [self.metadata, *disks]
        else:
            raise UsageError(f"{self.metadata} is not the metadata directory of a sheep")
        self._lock = DirectoryLock(self.metadata) if self._has_metadata else None
        self.disk = ScratchDisk()
        self.failures: list[str] = []

        def call_soon(call: Callable[[], None]) -> None:
            call()  # nothing runs in threads here

        def log(level: int, text: str) -> None:
            if level < _WARNING:
                self.failures.append(text)
            say(text)

        node = self._node(directories, log)
        self.copies = Copies(self.disk, ThreadWorkers(call_soon), log, lambda *_: None, lambda _: None)
        for directory in directories:
            self._add(directory, node, log)
        if self._has_metadata:
            self._tell_unnamed(log)
        found = self._journal(journal_directory, node, log)
        self.orderly = found.orderly
        replay.replay(self.copies, found, log)
        for copy in self.copies.by_oid.values():
            self.release(copy)

    def _node(self, directories: Sequence[str], log: Callable[[int, str], None]) -> bytes:
        """The node's id; if the superblock is damaged or lost, as the disks remember it."""
        try:
            if self._has_metadata:
                return node_identity(self.disk, self.metadata)
            failure = UsageError(f"{self.metadata}: nothing tells which node it belongs to")
        except UsageError as error:
            if not _is_damaged(error):
                raise
            log(3, str(error))
            failure = error
        for directory in directories:
            try:
                identity = read_disk_identity(self.disk, directory)
            except UsageError:
                continue  # told when the disk is added
            if identity is not None:
                return identity.node
        raise failure

    def _journal(self, directory: str | None, node: bytes, log: Callable[[int, str], None]) -> Found:
        last = LastJournal(self.disk, self.metadata, directory, log)
        try:
            found = last.look(node)
        except UsageError as error:
            if not _is_damaged(error):
                raise
            log(3, str(error))
            found = scan(self.disk, last.directory, node, log)
        if found.missing:
            log(3, found.missing)
        return found

    def _add(self, directory: str, node: bytes, log: Callable[[int, str], None]) -> None:
        try:
            identity = read_disk_identity(self.disk, directory)
        except UsageError as error:
            if not _is_damaged(error):
                raise
            log(3, str(error))
            identity = DiskIdentity(node, b"", 0)  # as whoever named it says
        if identity is None or identity.node != node:
            raise UsageError(f"{directory} is not a disk of this node")
        home = ObjectDirectory(self.disk, directory, log)
        home.identity, home.weight = identity.disk, max(1, identity.size)
        self.copies.add_home(home)

    def _tell_unnamed(self, log: Callable[[int, str], None]) -> None:
        """What a sheep had plugged since its start is on no command line."""
        known = KnownDisks(self.disk, self.metadata, log)
        known.load()
        missing = known.missing(home.identity for home in self.copies.homes)
        if missing:
            log(4, f"{self.metadata}: {len(missing)} disks that its sheep had last are not named: they are left out")

    def close(self) -> None:
        self.copies.files.close_all()
        if self._lock is not None:
            self._lock.release()

    def opened(self, copy: Copy) -> str | None:
        """None when the copy's file can be read, else what is wrong with it. `release` closes it."""
        if copy.size < 0:
            return "no readable header"
        error = self.copies.open_now(copy)
        return None if error is None else str(error)

    def release(self, copy: Copy) -> None:
        self.copies.files.forget(copy)

    def chunks(self, copy: Copy) -> Iterator[tuple[int, bytearray, list[int]]]:
        """(first block, whole blocks, which of them are bad) of the open copy; OSError."""
        for start in range(0, copy.table, CHUNK_BYTES):
            data = bytearray(min(CHUNK_BYTES, copy.table - start))
            self.disk.preadv(copy.fd, [data], start)
            first = start // BLOCK_SIZE
            yield (
                first,
                data,
                [first + position for position in trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + first)],
            )

    def block(self, copy: Copy, offset: int) -> bytes | None:
        """The block at `offset` of the open copy if it matches its hash."""
        data = bytearray(BLOCK_SIZE)
        if offset >= copy.table:
            return None
        try:
            self.disk.preadv(copy.fd, [data], offset)
        except (OSError, StoreError):
            return None
        return None if trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + offset // BLOCK_SIZE) else bytes(data)


def _exists(path: str) -> bool:
    """OSError where that cannot be told: this user may not look."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_damaged(error: UsageError) -> bool:
    """A file with a wrong checksum; not one of a newer format."""
    return isinstance(error.__cause__, Corrupt)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: 1, 4-7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
