"""New objects: the record that makes one, and its file.

A small one is in the journal with all its bytes, so that its file need not be there before it is answered: the applier
makes it. What is larger than the journal takes goes to a file with another name, which gets its own by the record.
"""

from __future__ import annotations

import os
from array import array
from typing import Final

from sheepdog.cluster.core.errors import DiskError, NoSpace, StoreError
from sheepdog.cluster.core.ids import ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import write_all
from sheepdog.cluster.host.object_file import Copy, write_trailer
from sheepdog.cluster.host.records import Record, RecordKind
from sheepdog.cluster.host.trailer import FIRST_ENTRY, filled_runs, hashes_of_filled

_BLOCK_MASK: Final = BLOCK_SIZE - 1


class Creations:
    """Of a store. Copies made here are not the objects' (`gone`) until the store installs them."""

    def __init__(self, copies: Copies, journaled_bytes: int) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._journaled_bytes = journaled_bytes

    def record(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool, done: Done
    ) -> Record | StoreError:
        """Of a new copy with `data` at `offset`, which lie inside; NoSpace where it has no room."""
        end = offset + len(data)
        head = offset & _BLOCK_MASK
        if head or end & _BLOCK_MASK:
            data = bytes(head) + bytes(data) + bytes(min(-end & _BLOCK_MASK, size - end))
            offset -= head
        copy = self._place(oid, size, version, len(data))
        if isinstance(copy, StoreError):
            return copy
        make = self._large if len(data) > self._journaled_bytes else self._small
        record = make(copy, offset, data, durable, done)
        if isinstance(record, Record):
            record.durable = True  # the object's existence is; `wants_data` tells about its bytes
        return record

    def _small(self, copy: Copy, offset: int, data: Buffer, durable: bool, done: Done) -> Record:
        copy.attach(-1, bytearray(trailer.trailer_size(copy.size)))
        copy.unmade = True
        first, hashes = offset >> 12, _enter(copy, offset, data)
        return Record(
            RecordKind.CREATE, copy, first, len(hashes), len(data), hashes, bytes(data), copy.version, durable, done
        )

    def _large(self, copy: Copy, offset: int, data: Buffer, durable: bool, done: Done) -> Record | StoreError:
        path = self._make_file(copy)
        if isinstance(path, StoreError):
            return path
        view, hashes = memoryview(data), _enter(copy, offset, data)
        try:
            for start, stop in filled_runs(hashes, len(view)):
                write_all(self._disk, copy.fd, view[start:stop], offset + start)
            write_trailer(self._disk, copy)
        except OSError as error:
            self.discard_file(copy, path)
            return self._copies.write_failed(copy.home, error)
        record = Record(
            RecordKind.CREATE_LARGE, copy, offset >> 12, 0, len(view), hashes, b"", copy.version, durable, done
        )
        record.path = path
        return record

    def _place(self, oid: ObjectId, size: int, version: Version, length: int) -> Copy | StoreError:
        """A copy without a file, on a disk with room for it and `length` bytes in it."""
        old = self._copies.by_oid.get(oid)
        home = old.home if old is not None and not old.home.failed else self._copies.home_for(oid)
        if home is None:
            return DiskError("no disk is in service")
        allocated = (trailer.trailer_size(size) + _BLOCK_MASK) & ~_BLOCK_MASK
        if not home.has_room(allocated + length):
            return NoSpace(f"{home.path} is full")
        copy = Copy(oid, size, version, home)
        copy.gone = True
        copy.allocated = allocated
        return copy

    def _make_file(self, copy: Copy) -> str | StoreError:
        """A new file of holes, not in place yet: its present path."""
        path = copy.home.new_path(copy.oid)
        try:
            fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            return self._copies.write_failed(copy.home, error)
        copy.attach(fd, bytearray(trailer.trailer_size(copy.size)))
        return path

    def make_file(self, oid: ObjectId, size: int, version: Version) -> tuple[Copy, str] | StoreError:
        """A new copy with a file of holes, not in place yet, and the file's present path."""
        copy = self._place(oid, size, version, 0)
        if isinstance(copy, StoreError):
            return copy
        path = self._make_file(copy)
        return path if isinstance(path, StoreError) else (copy, path)

    def discard_file(self, copy: Copy, path: str) -> None:
        """Undoes `make_file`."""
        self._disk.close(copy.detach())
        try:
            self._disk.unlink(path)
        except OSError as error:
            self._copies.fail(copy.home, error)


def _enter(copy: Copy, offset: int, data: Buffer) -> list[int]:
    """The copy's first contents: their hashes, which its table has from here on."""
    first, hashes = FIRST_ENTRY + (offset >> 12), hashes_of_filled(data)
    copy.entries[first : first + len(hashes)] = memoryview(array("Q", hashes))
    copy.allocated += BLOCK_SIZE * (len(hashes) - hashes.count(0))
    return hashes
