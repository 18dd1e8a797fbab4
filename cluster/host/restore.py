"""Restores: bringing a copy to another copy's bytes, block by block, past the journal.

A restore is marked twice, in the file's header (for after a checkpoint) and by a record (so that older records of the
object are not replayed over it); both are durable before its first byte changes. It ends with a durable trailer and a
record. In between, and after a crash, the copy has no version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.errors import DiskError, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.applier import Applier
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.creating import Creations
from sheepdog.cluster.host.directory import write_all
from sheepdog.cluster.host.object_file import Copy, write_trailer
from sheepdog.cluster.host.pipeline import Pipeline
from sheepdog.cluster.host.records import Record, RecordKind
from sheepdog.cluster.host.syncs import DirectorySyncs, FileSyncs
from sheepdog.cluster.host.trailer import FIRST_ENTRY

_BLOCK_MASK: Final = BLOCK_SIZE - 1
REHASH_BYTES: Final = 1 << 20  # read at a time when a copy is hashed anew


class NoRestore(StoreError):
    """Blocks for a copy that is not being restored, or not of whole blocks."""

    result = Result.INVALID_PARMS


class Restores:
    """The restores of a store."""

    def __init__(
        self,
        copies: Copies,
        pipeline: Pipeline,
        applier: Applier,
        syncs: FileSyncs,
        directories: DirectorySyncs,
        creations: Creations,
        install: Callable[[Copy], Copy | None],
        nosync: bool,
    ) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._pipeline = pipeline
        self._applier = applier
        self._syncs = syncs
        self._directories = directories
        self._creations = creations
        self._install = install
        self._nosync = nosync
        self._unpunched: dict[Copy, StoreError] = {}  # holes that found no room: such a restore does not end well

    def begin(self, oid: ObjectId, size: int) -> StoreError | None:
        copy = self._copies.by_oid.get(oid)
        if copy is not None:
            self._unpunched.pop(copy, None)
        if copy is not None and copy.size == size and self._copies.open_now(copy) is None:
            self.trust(copy)
            if not copy.restoring:
                self._begin_here(copy)
            return None
        made = self._creations.make_file(oid, size, NO_VERSION)
        if isinstance(made, StoreError):
            return made
        copy, path = made
        copy.restoring = True
        try:
            write_trailer(self._disk, copy, trailer.RESTORING)
        except OSError as error:
            self._creations.discard_file(copy, path)
            return self._copies.write_failed(copy.home, error)
        record = Record(RecordKind.CREATE_LARGE, copy, 0, 0, 0, [], b"", NO_VERSION, True, None)
        record.replaces = self._install(copy)
        record.path = path
        record.wants_data = False
        self._pipeline.submit(record)
        self._submit(copy, RecordKind.RESTORE, NO_VERSION, _ignore)
        return None

    def forget(self, copy: Copy) -> None:
        """It is removed or replaced."""
        self._unpunched.pop(copy, None)

    def trust(self, copy: Copy) -> None:
        """Hashes what a restore before the last crash left, so that only the rest is fetched; blocks for some ms."""
        if copy.trusted:
            return
        copy.trusted = True
        chunk = bytearray(min(REHASH_BYTES, copy.table))
        view = memoryview(chunk)
        for start in range(0, copy.table, len(chunk)):
            part = view[: min(len(chunk), copy.table - start)]
            try:
                self._disk.preadv(copy.fd, (part,), start)
            except OSError as error:
                self._copies.fail(copy.home, error)
                return
            for at in range(0, len(part), BLOCK_SIZE):
                block = part[at : at + BLOCK_SIZE]
                value = 0 if bytes(block) == trailer.ZERO_BLOCK else trailer.hash_of(block)
                copy.entries[FIRST_ENTRY + (start + at >> 12)] = value
        self._applier.touch(copy)

    def _begin_here(self, copy: Copy) -> None:
        copy.restoring = True
        copy.version = NO_VERSION
        # What is on its way to the file gets there before the restore's first byte; the table says so already.
        grown = 0
        for block, record in copy.pending.items():
            new = record.hash(block)
            grown += bool(new) - bool(copy.entries[FIRST_ENTRY + block])
            copy.entries[FIRST_ENTRY + block] = new
        self._copies.grow(copy, grown * BLOCK_SIZE)
        copy.pending.clear()
        self._copies.close_gate(copy)
        copy.pins += 1

        def recorded(error: StoreError | None) -> None:
            copy.applied = NO_VERSION
            try:
                if error is None and not copy.home.failed:
                    write_trailer(self._disk, copy, trailer.RESTORING)
            except OSError as failure:
                error = self._copies.fail(copy.home, failure)
            if error is not None or self._nosync or copy.home.failed:
                marked(error)
            else:
                self._syncs.sync(copy, marked)

        def marked(error: StoreError | None) -> None:
            copy.pins -= 1
            self._copies.open_gate(copy)

        self._submit(copy, RecordKind.RESTORE, NO_VERSION, recorded)

    def _submit(self, copy: Copy, kind: int, version: Version, done: Done) -> None:
        self._pipeline.submit(Record(kind, copy, 0, 0, 0, [], b"", version, True, done))

    def write(self, oid: ObjectId, offset: int, data: Buffer, done: Done) -> None:
        def action(copy: Copy) -> None:
            if self._may_restore(copy, offset, len(data), done):
                done(self._put(copy, offset, data))

        self._copies.with_open(oid, action, done)

    def _put(self, copy: Copy, offset: int, data: Buffer) -> StoreError | None:
        if not copy.home.has_room(len(data)):
            return self._copies.write_failed(copy.home, OSError(28, "No space left on device"))
        copy.changes += 1
        try:
            write_all(self._disk, copy.fd, data, offset)
        except OSError as error:
            return self._copies.write_failed(copy.home, error)
        filled = trailer.hash_blocks(data, copy.entries, FIRST_ENTRY + (offset >> 12))
        self._copies.rot.written(copy.oid, offset >> 12, (len(data) + _BLOCK_MASK) >> 12)
        self._copies.grow(copy, filled * BLOCK_SIZE)
        self._applier.touch(copy)
        self._syncs.mark_dirty(copy)
        return None

    def punch(self, oid: ObjectId, offset: int, length: int) -> None:
        """The table shows the holes at once; the file gets them when the mark of the restore is durable."""
        first, count = offset >> 12, (length + _BLOCK_MASK) >> 12

        def action(copy: Copy) -> None:
            if not self._may_restore(copy, offset, length, _ignore):
                return
            copy.changes += 1
            self._clear(copy, first, count)
            try:
                self._disk.punch(copy.fd, first << 12, count << 12)
            except OSError as error:
                self._unpunched[copy] = self._copies.write_failed(copy.home, error)
                copy.trusted = False  # its table says more than is true
            self._applier.touch(copy)
            self._syncs.mark_dirty(copy)

        copy = self._copies.by_oid.get(oid)
        if copy is not None and copy.fd >= 0 and self._may_restore(copy, offset, length, _ignore):
            self._clear(copy, first, count)
        self._copies.with_open(oid, action, _ignore)

    def _clear(self, copy: Copy, first: int, count: int) -> None:
        self._copies.rot.written(copy.oid, first, count)
        index = FIRST_ENTRY + first
        filled = sum(1 for entry in copy.entries[index : index + count] if entry)
        copy.trailer[index * 8 : (index + count) * 8] = bytes(count * 8)
        self._copies.grow(copy, -filled * BLOCK_SIZE)

    @staticmethod
    def _may_restore(copy: Copy, offset: int, length: int, failed: Done) -> bool:
        end = offset + length
        whole = not offset & _BLOCK_MASK and (not end & _BLOCK_MASK or end == copy.size)
        if copy.restoring and whole and 0 <= offset < end <= copy.size:
            return True
        failed(NoRestore(f"no restore of {copy.oid:016x} takes {length} bytes at {offset}"))
        return False

    def finish(self, oid: ObjectId, version: Version, done: Done) -> None:
        def action(copy: Copy) -> None:
            if not copy.restoring:
                done(NoRestore(f"no restore of {oid:016x} has begun"))
                return
            unpunched = self._unpunched.pop(copy, None)
            if unpunched is not None:
                done(unpunched)
                return
            self._copies.close_gate(copy)
            copy.pins += 1
            # Behind the rename of a new file, which is in the pipeline.
            self._submit(copy, RecordKind.RESTORE, NO_VERSION, lambda error: self._complete(copy, version, error, done))

        self._copies.with_open(oid, action, done)

    def _complete(self, copy: Copy, version: Version, error: StoreError | None, done: Done) -> None:
        """Bytes, then trailer, then name, then record; each durable before the next."""

        def ended(error: StoreError | None) -> None:
            if error is None and copy.home.failed:
                error = DiskError(f"{copy.home.path} is out of service")
            if error is None:
                copy.restoring = False
                copy.version = version
                self._applier.touch(copy)  # a checkpoint may have written meanwhile that it is not complete
            copy.pins -= 1
            self._copies.open_gate(copy)
            done(error)

        def then(error: StoreError | None, step: Callable[[Done], None], after: Done) -> None:
            if error is not None or copy.gone:
                ended(error)
            elif self._nosync:
                after(None)
            else:
                step(after)

        def synced(error: StoreError | None) -> None:
            if error is None and not copy.home.failed:
                copy.applied = version
                try:
                    write_trailer(self._disk, copy)
                except OSError as failure:
                    error = self._copies.write_failed(copy.home, failure)
            then(error, lambda after: self._syncs.sync(copy, after), trailer_synced)

        def trailer_synced(error: StoreError | None) -> None:
            then(error, lambda after: self._directories.sync(copy.home, after), named)

        def named(error: StoreError | None) -> None:
            if error is not None:
                ended(error)
            else:
                self._submit(copy, RecordKind.RESTORED, version, ended)

        then(error, lambda after: self._syncs.sync(copy, after), synced)


def _ignore(error: StoreError | None) -> None:
    """The failure shows in what follows."""
