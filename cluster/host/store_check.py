"""Offline work on bare stores, no daemon running: verify every block, rebuild a volume from what is left.

Nothing is changed on the disks: a journal that was not replayed is replayed in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Final, TypeAlias

from sheepdog.cluster.core.errors import PeerError, StoreError, UsageError
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, is_inode
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_ENTRY_SIZE, MAP_OFFSET, InodeHeader, unpack_map
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.host import replay, trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory
from sheepdog.cluster.host.node_state import DirectoryLock
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.scratch_disk import ScratchDisk
from sheepdog.cluster.host.superblock import node_identity, read_disk_identity
from sheepdog.cluster.host.trailer import FIRST_ENTRY
from sheepdog.cluster.host.workers import CallSoon, ThreadWorkers

CHUNK_BYTES: Final = 1 << 20  # read at a time: fast from a disk, small in memory
Say: TypeAlias = Callable[[str], None]


class BareStore:
    """The copies of one node as a daemon would find them. `path` is META[,DISK...] as on its command line."""

    def __init__(self, path: str, say: Say, journal_directory: str | None = None) -> None:
        """UsageError when a daemon uses the store, or when there is none; OSError."""
        metadata, *disks = path.split(",")
        if not os.path.exists(f"{metadata}/superblock"):
            raise UsageError(f"{metadata} is not the metadata directory of a sheep")
        self._lock = DirectoryLock(metadata)
        self.disk = ScratchDisk()
        node = node_identity(self.disk, metadata)
        call_soon: CallSoon = lambda call: call()  # noqa: E731 (nothing runs in threads here)
        self.failures: list[str] = []

        def log(level: int, text: str) -> None:
            if level <= 4:
                self.failures.append(text)
            say(text)

        self.copies = Copies(
            self.disk,
            ThreadWorkers(call_soon),
            log,
            lambda path, text, last: self.failures.append(text),
            lambda _: None,
        )
        for directory in disks or [f"{metadata}/obj"]:
            self._add(directory, node, log)
        replay.replay(self.copies, replay.scan(self.disk, journal_directory or metadata, node, log), log)

    def _add(self, directory: str, node: bytes, log: Callable[[int, str], None]) -> None:
        identity = read_disk_identity(self.disk, directory)
        if identity is None or identity.node != node:
            raise UsageError(f"{directory} is not a disk of this node")
        home = ObjectDirectory(self.disk, directory, log)
        home.identity, home.weight = identity.disk, max(1, identity.size)
        self.copies.add_home(home)

    def close(self) -> None:
        self.copies.files.close_all()
        self._lock.release()

    def opened(self, copy: Copy) -> str | None:
        """None when the copy's file can be read, else what is wrong with it."""
        if copy.size < 0:
            return "no readable header"
        error = self.copies.open_now(copy)
        return None if error is None else str(error)

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


@dataclass(slots=True)
class Summary:
    """What a check found."""

    objects: int = 0
    blocks: int = 0
    unfinished: int = 0  # copies that a restore did not complete
    damaged: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.damaged


def check(path: str, say: Say, journal_directory: str | None = None) -> Summary:
    """Verifies every object of a node's store; one line for each damaged one. UsageError, OSError."""
    summary = Summary()
    store = BareStore(path, say, journal_directory)
    try:
        for oid in sorted(store.copies.by_oid):
            copy = store.copies.by_oid[oid]
            summary.objects += 1
            problem = store.opened(copy)
            if problem is None and copy.restoring:
                summary.unfinished += 1
                continue
            bad: list[int] = []
            if problem is None:
                for _, data, found in store.chunks(copy):
                    summary.blocks += len(data) // BLOCK_SIZE
                    bad += found
            if bad:
                problem = f"blocks {_ranges(bad)} do not match their hashes"
            if problem is not None:
                summary.damaged.append(f"{copy.path}: {problem}")
                say(summary.damaged[-1])
    finally:
        store.close()
    return summary


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


class Salvage:
    """Volumes out of the stores of several nodes. The newest readable copy of every block counts."""

    def __init__(self, paths: Sequence[str], say: Say) -> None:
        self._say = say
        self._stores = [BareStore(path, say) for path in paths]
        self.lost: list[str] = []  # what could not be had, as text

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def volumes(self) -> Iterator[InodeHeader]:
        """Every inode of which a copy can be read, ascending vid; also deleted ones (without a name)."""
        oids = {oid: None for store in self._stores for oid in store.copies.by_oid if is_inode(oid)}
        for oid in sorted(oids):
            data = self._read(oid, HEADER_SIZE)
            try:
                if data is not None:
                    yield InodeHeader.unpack(data)
            except PeerError as error:
                self._say(f"{oid:016x}: {error}")

    def write_volume(self, name: bytes, snapshot: int, image: BinaryIO) -> bool:
        """Writes a volume (snapshot 0: the working one) into a file, holes left out; False when parts are lost.

        UsageError without such a volume, or when it is erasure-coded or a hyper volume.
        """
        header = self._find(name, snapshot)
        if header.copy_policy:
            raise UsageError(f"{name.decode(errors='replace')} is erasure-coded: salvage needs its strips decoded")
        if header.store_policy:
            raise UsageError(f"{name.decode(errors='replace')} is a hyper volume, which salvage cannot read")
        inode = ObjectId(1 << 63 | header.vdi_id << 32)
        entries = unpack_map((self._read(inode, MAP_OFFSET + MAP_ENTRY_SIZE * header.object_count) or b"")[MAP_OFFSET:])
        image.truncate(header.vdi_size)
        for index, vid in enumerate(entries):
            if vid:
                oid = data_oid(Vid(vid), index)
                start = index << header.block_size_shift
                length = min(header.object_size, header.vdi_size - start)
                self._write_object(oid, start, length, image)
        return not self.lost

    def _find(self, name: bytes, snapshot: int) -> InodeHeader:
        for header in self.volumes():
            wanted = header.snap_id == snapshot and header.is_snapshot if snapshot else not header.is_snapshot
            if header.name == name and wanted:
                return header
        raise UsageError(f"no volume {name.decode(errors='replace')} in these stores")

    def _copies(self, oid: ObjectId) -> list[tuple[BareStore, Copy]]:
        """Readable copies, the newest version first; those of an unfinished restore last."""
        found = []
        for store in self._stores:
            copy = store.copies.by_oid.get(oid)
            if copy is not None and store.opened(copy) is None:
                found.append((store, copy))
        found.sort(key=lambda entry: entry[1].version, reverse=True)
        return found

    def _read(self, oid: ObjectId, length: int) -> bytes | None:
        """The object's first bytes; None when they cannot all be had."""
        data = bytearray()
        for _, block in self._blocks(oid, length):
            if block is None:
                return None
            data += block
        return bytes(data[:length]) if len(data) >= length else None

    def _blocks(self, oid: ObjectId, length: int) -> Iterator[tuple[int, bytes | None]]:
        """(offset, bytes) of the object's blocks; None for a block that no copy has."""
        copies = self._copies(oid)
        for offset in range(0, length, BLOCK_SIZE):
            yield offset, next(filter(None, (self._block(*entry, offset) for entry in copies)), None)

    @staticmethod
    def _block(store: BareStore, copy: Copy, offset: int) -> bytes | None:
        data = bytearray(BLOCK_SIZE)
        if offset >= copy.table:
            return None
        try:
            store.disk.preadv(copy.fd, [data], offset)
        except (OSError, StoreError):
            return None
        return None if trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + offset // BLOCK_SIZE) else bytes(data)

    def _write_object(self, oid: ObjectId, start: int, length: int, image: BinaryIO) -> None:
        lost = []
        for offset, block in self._blocks(oid, length):
            if block is None:
                lost.append(offset // BLOCK_SIZE)
            elif block != trailer.ZERO_BLOCK:
                image.seek(start + offset)
                image.write(block[: length - offset])
        if lost:
            self.lost.append(f"object {oid:016x} (from byte {start}): blocks {_ranges(lost)} are lost")
            self._say(self.lost[-1])
