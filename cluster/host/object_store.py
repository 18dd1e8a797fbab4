"""The objects of a node on its disks: `ports.Store` over a journal and files (docs/format.md).

Called on the loop's thread. Every change goes through the journal (pipeline.py); reads take what is not in the file yet
from memory. Reads and writes that the page cache can take run on the loop's thread, what may block runs in `Workers`.
Changes of one object take effect in call order. Every block read is verified. An I/O error takes the disk out of
service: it is reported once, never retried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from sheepdog.cluster.core.errors import DiskError, NoObject, NoSpace, OutOfRange, StoreError
from sheepdog.cluster.core.ids import ObjectId, Version, Vid, is_plain_data, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, JOURNALED_BYTES, JOURNALED_NOSYNC_BYTES
from sheepdog.cluster.core.ports import Buffer, Clock, Done, Log, ReadDone, Store
from sheepdog.cluster.host import replay
from sheepdog.cluster.host.applier import Applier
from sheepdog.cluster.host.checkpoint import Checkpoints
from sheepdog.cluster.host.copies import Copies, DiskFailed, Superseded
from sheepdog.cluster.host.creating import Creations
from sheepdog.cluster.host.directory import Listed, ObjectDirectory, make_directory
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.journal import Journal, WrittenBefore
from sheepdog.cluster.host.journal_scan import Found
from sheepdog.cluster.host.last_journal import LastJournal
from sheepdog.cluster.host.multi_disk import Disks
from sheepdog.cluster.host.no_room import NoRoom
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.pipeline import AtEnd, Pipeline
from sheepdog.cluster.host.reading import Reads, in_range
from sheepdog.cluster.host.rebalance import Rebalance
from sheepdog.cluster.host.records import PunchRecord, Record, RecordKind, cut_blocks
from sheepdog.cluster.host.restore import Restores
from sheepdog.cluster.host.store_options import DEFAULT_OPTIONS, StoreOptions
from sheepdog.cluster.host.superblock import RandomBytes, disk_identity, node_identity
from sheepdog.cluster.host.syncs import DirectorySyncs, FileSyncs, gather
from sheepdog.cluster.host.trailer import block_hashes
from sheepdog.cluster.host.uncached import Uncached
from sheepdog.cluster.host.verifying import Verifying
from sheepdog.cluster.host.workers import Workers

_BLOCK_MASK: Final = BLOCK_SIZE - 1


class ObjectStore(Store):
    """`ports.Store`. With `nosync` nothing waits for a sync (P2 is void on this node)."""

    def __init__(
        self,
        metadata: str,
        directories: Sequence[str],
        disk: Disk,
        workers: Workers,
        clock: Clock,
        at_end: AtEnd,
        log: Log,
        on_disk_failure: DiskFailed,
        options: StoreOptions = DEFAULT_OPTIONS,
        random_bytes: RandomBytes = os.urandom,
        before: WrittenBefore | None = None,
        forget_proven: Callable[[], None] = lambda: None,
        after_look: AtEnd | None = None,
    ) -> None:
        """`before`: see Journal; `forget_proven`: see Disks; `after_look`: see Turn; None: there is no loop."""
        self._forget_proven = forget_proven
        self._before = before
        self._metadata = metadata
        self._directories = tuple(directories)
        self._disk = disk
        self._workers = workers
        self._clock = clock
        self._at_end = at_end
        self._after_look = after_look or at_end
        self._log = log
        self._on_disk_failure = on_disk_failure
        self._options = options
        self.nosync = options.nosync
        self._journaled_bytes = JOURNALED_NOSYNC_BYTES if options.nosync else JOURNALED_BYTES
        self._random_bytes = random_bytes
        self.copies = Copies(disk, workers, log, on_disk_failure, self._settle)
        self._syncs = FileSyncs(disk, workers, self.copies.sync_failed, self._synced, self._large_writes_done)
        self._directory_syncs = DirectorySyncs(workers, self.copies.sync_failed)
        self._no_room = NoRoom(clock, log)
        self._applier = Applier(self.copies, self._syncs, self._directory_syncs, self._no_room, options.nosync)
        self._last_journal = LastJournal(disk, metadata, options.journal_directory, log)
        self._creations = Creations(self.copies, self._journaled_bytes)
        self._by_oid = self.copies.by_oid
        self._reads = Reads(self.copies)
        self._verifying = Verifying(self.copies, self._rewrite)

    # Life

    def open(self) -> None:
        """Makes the directories, learns what is there and replays the journal; blocks. UsageError, OSError."""
        make_directory(self._disk, self._metadata)
        make_directory(self._disk, f"{self._metadata}/obj")  # empty when other directories are named (cli.md 1.2)
        self.node = node_identity(self._disk, self._metadata, self._random_bytes)
        self.disks = Disks(self.copies, self._metadata, self.node, self._open_disk, self._forget_proven)
        self.disks.open(self._directories)
        found = self._last_journal.find(self.node, self._options.journal_skip)
        replay.replay(self.copies, found, self._log, disk_missing=self.disks.some_missing())
        if found.incomplete:  # what it created or removed is not known here
            self._forget_proven()
        self.disks.settle()
        self._open_journal(found)
        self._pipeline = Pipeline(
            self._journal,
            self._applier,
            self._at_end,
            self._after_look,
            self._clock,
            self.nosync,
            self._journal_switched,
        )
        self._applier.note_done = self._pipeline.note_done
        self._applier.answer_behind = self._pipeline.answer_behind
        self._checkpoints = Checkpoints(
            self.copies, self._journal, self._applier, self._syncs, self._directory_syncs, self._no_room
        )
        self._restores = Restores(
            self.copies,
            self._pipeline,
            self._applier,
            self._syncs,
            self._directory_syncs,
            self._creations,
            self.install,
            self.nosync,
        )
        if self._options.direct_io:
            Uncached(self.copies, self._clock).begin()
        self.rebalance = Rebalance(self.copies, self._clock, lambda done: self._pipeline.flush(None, done))

    def _open_journal(self, found: Found) -> None:
        """Begins a new segment, and notes where; what was found is in place."""
        last = self._last_journal
        make_directory(self._disk, last.directory)
        self._journal = Journal(
            last.directory,
            last.segment_bytes(found, self._options.journal_bytes),
            self.node,
            last.identity(found, self._random_bytes),
            self._disk,
            self._workers,
            self._journal_failed,
            self._before,
            not self.nosync,
        )
        self._journal.start(found.next_number)
        last.started(self._journal)

    def _open_disk(self, directory: str) -> ObjectDirectory:
        home = ObjectDirectory(self._disk, directory, self._log)
        home.prepare()
        identity = disk_identity(self._disk, directory, self.node, self._random_bytes)
        home.identity, home.weight = identity.disk, max(1, identity.size)
        home.doubtful = self.disks.is_doubtful(home)
        self.copies.add_home(home)
        return home

    def close(self, done: Callable[[], None]) -> None:
        """Brings everything into the files, durably, and leaves the journal empty; writes the index for the next start.

        Nothing may be called after this.
        """

        def checkpointed() -> None:
            for home in self.copies.homes:
                listed = [
                    Listed(copy.oid, copy.size, copy.allocated, copy.version)
                    for copy in self._by_oid.values()
                    if copy.home is home
                ]
                try:
                    if not home.failed:
                        home.save_index(listed)
                except OSError as failure:
                    self._log(4, f"{home.path}: no index written: {failure}")
            self.copies.files.close_all()
            if self._pipeline.error is None:
                self._last_journal.emptied(self._journal)
            self._journal.close()
            done()

        def switch() -> None:
            if self._pipeline.error is not None or self._no_room.waiting or not self._journal.can_switch():
                self._journal.close()  # the next start replays it
                done()
                return
            self._journal.switch()
            self._checkpoints.begin(self._pipeline)
            self._checkpoints.when_done(checkpointed)

        self.flush(None, lambda error: switch() if self._no_room.waiting else self._checkpoints.when_done(switch))

    # What is here

    def version(self, oid: ObjectId) -> Version | None:
        copy = self._by_oid.get(oid)
        return None if copy is None else copy.version

    def inventory(self) -> Iterable[tuple[ObjectId, Version]]:
        return self.copies.inventory()

    def size(self, oid: ObjectId) -> int:
        return self.copies.find(oid).size

    def table(self, oid: ObjectId) -> bytes:
        copy = self.copies.find(oid)
        error = self.copies.open_now(copy)
        if error is not None:
            raise error
        self._restores.trust(copy)
        return copy.current_table()

    def usage(self) -> tuple[int, int]:
        homes = [home for home in self.copies.homes if not home.failed]
        return sum(home.used for home in homes), sum(home.free() for home in homes)

    # Reading (reading.py)

    def read(self, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        self._reads.read(oid, offset, length, done)

    def verify(self, oid: ObjectId, offset: int, length: int, done: Done) -> None:
        self._verifying.verify(oid, offset, length, done)

    def _rewrite(self, copy: Copy, done: Done) -> None:
        """The trailer on the disk becomes again what it should be."""
        self._applier.touch(copy)
        self._checkpoints.settle(copy, done)

    # Writing

    def _may_write(self, copy: Copy, offset: int, length: int, failed: Done) -> bool:
        if copy.restoring:
            failed(NoObject(f"the copy of {copy.oid:016x} here is being restored"))
            return False
        if self._no_room.waiting and self._no_room.refuses(copy, self._journal):
            failed(NoSpace(f"{copy.home.path} is full"))
            return False
        return in_range(copy, offset, length, failed)

    def write(self, oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        copy = self._by_oid.get(oid)
        if copy is not None and copy.fd >= 0 and not copy.busy:
            self.copies.files.used(oid)
            self._write(copy, offset, data, version, durable, done)
        else:
            self.copies.with_open(
                oid,
                lambda copy: self._write(copy, offset, data, version, durable, done),
                self._unless_superseded(durable, done),
            )
        return copy is not None and copy.version == version

    def _write(self, copy: Copy, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> None:
        length = len(data)
        if not self._may_write(copy, offset, length, done):
            return
        end = offset + length
        if offset & _BLOCK_MASK or (end & _BLOCK_MASK and end != copy.size):
            merged = self._reads.widened(
                copy, offset, data, done, lambda: self._write(copy, offset, data, version, durable, done)
            )
            if merged is None:
                return
            offset, data = merged
            length = len(data)
        first = offset >> 12
        count = (length + _BLOCK_MASK) >> 12
        if not copy.is_filled(first, count) and not copy.gone and not copy.home.has_room(length):
            done(NoSpace(f"{copy.home.path} is full"))
            return
        copy.version = version
        # Without syncs the journal need not have the bytes: a kill leaves what the kernel was given, and the hash tells
        # whether it was. If all copies are cut so, any of them will do, but of strips and inodes none is as good.
        if length > self._journaled_bytes or (self.nosync and is_plain_data(copy.oid)):
            kind = RecordKind.INTENT
        else:
            kind = RecordKind.WRITE
            if type(data) is not bytes:
                data = bytes(data)  # it stays in memory after `done`
        hashes = block_hashes(data)
        self._pipeline.submit(Record(kind, copy, first, count, length, hashes, data, version, durable, done))

    def _unless_superseded(self, durable: bool, done: Done) -> Done:
        """A write that came before a removal or replacement has taken effect, whatever became of the file."""

        def failed(error: StoreError | None) -> None:
            if isinstance(error, Superseded):
                copy = error.copy
                self._pipeline.submit(Record(RecordKind.DONE, copy, 0, 0, 0, [], b"", copy.version, durable, done))
            else:
                done(error)

        return failed

    def punch(self, oid: ObjectId, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        self.copies.with_open(
            oid,
            lambda copy: self._punch(copy, offset, length, version, durable, done),
            self._unless_superseded(durable, done),
        )

    def _punch(self, copy: Copy, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        if not self._may_write(copy, offset, length, done):
            return
        edges: dict[int, Buffer | None] = {}
        for block in cut_blocks(offset, length, copy.size):
            if copy.is_hole(block):  # zeros in a hole change nothing
                edges[block] = None
                continue
            data = self._reads.block(
                copy, block << 12, done, lambda: self._punch(copy, offset, length, version, durable, done)
            )
            if data is None:
                return
            start = block << 12
            kept = bytearray(data[: copy.size - start])
            low, high = max(offset - start, 0), min(offset + length - start, len(kept))
            kept[low:high] = bytes(high - low)
            edges[block] = bytes(kept)
        copy.version = version
        self._pipeline.submit(PunchRecord(copy, offset, length, edges, version, durable, done))

    def stamp(self, oid: ObjectId, version: Version, durable: bool, done: Done) -> None:
        self.copies.with_open(
            oid, lambda copy: self._stamp(copy, version, durable, done), self._unless_superseded(durable, done)
        )

    def _stamp(self, copy: Copy, version: Version, durable: bool, done: Done) -> None:
        """A write of no blocks."""
        if not self._may_write(copy, 0, copy.size, done):
            return
        copy.version = version
        self._pipeline.submit(Record(RecordKind.WRITE, copy, 0, 0, 0, [], b"", version, durable, done))

    # Creating and removing

    def create(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool, done: Done
    ) -> None:
        if offset < 0 or size <= 0 or offset + len(data) > size:
            done(OutOfRange(f"{offset}+{len(data)} is not inside {oid:016x} of {size} bytes"))
            return
        answer = partial(self.copies.files.when_room, done) if self.copies.files.crowded() else done
        record = self._creations.record(oid, size, offset, data, version, durable, answer)
        if isinstance(record, StoreError):
            done(record)
            return
        record.replaces = self.install(record.copy)
        self._pipeline.submit(record)

    def install(self, copy: Copy | None, oid: ObjectId | None = None) -> Copy | None:
        """From now on this is the object. Returns the copy before it, pinned for the record that says so."""
        if oid is None:
            assert copy is not None
            oid = copy.oid
        old = self._by_oid.get(oid)
        if old is not None:
            old.pins += 1
        self.copies.replace(oid, copy)
        if old is not None:
            self._syncs.forget(old)
            self._restores.forget(old)
            self._applier.unnamed.pop(old, None)
            self._applier.unnamed_intents.pop(old, None)
        return old

    def remove(self, oid: ObjectId, done: Done) -> None:
        copy = self.install(None, oid)
        if copy is None:
            done(None)
            return
        record = Record(RecordKind.REMOVE, copy, 0, 0, 0, [], b"", copy.version, True, done)
        record.replaces = copy
        self._pipeline.submit(record)

    # Restoring (restore.py)

    def restore_begin(self, oid: ObjectId, size: int) -> StoreError | None:
        return self._restores.begin(oid, size)

    def restore_write(self, oid: ObjectId, offset: int, data: Buffer, done: Done) -> None:
        self._restores.write(oid, offset, data, done)

    def restore_punch(self, oid: ObjectId, offset: int, length: int) -> None:
        self._restores.punch(oid, offset, length)

    def restore_finish(self, oid: ObjectId, version: Version, done: Done) -> None:
        self._restores.finish(oid, version, done)

    # Durability

    def flush(self, vids: frozenset[Vid] | None, done: Done) -> None:
        if self.nosync:
            done(None)
            return
        large = self._syncs.dirty(vids)
        large += [
            copy
            for copy, by_file in self._applier.unnamed.items()
            if by_file and copy not in large and (vids is None or vid_of(copy.oid) in vids)
        ]
        if vids is None:  # what went with its disk the node has told: only who wrote it has to hear that from a flush
            large = [copy for copy in large if copy.size >= 0]

        def synced(error: StoreError | None) -> None:
            if error is not None or not large:
                done(error)
            else:
                self._pipeline.note_done(large[0], 0, done)

        steps: list[Callable[[Done], None]] = [lambda each: self._pipeline.flush(vids, each)]
        steps += [partial(self._applier.sync_with_name, copy) for copy in large]
        gather(steps, synced)

    def _settle(self, copy: Copy) -> None:
        """The copy's file should be closed: brings what the journal has into it, then makes it clean."""
        if copy.pending:
            self._pipeline.want_sync()
        elif not copy.pins and not copy.busy:
            self._checkpoints.settle(copy, ignore)

    def _synced(self, copy: Copy) -> None:
        self.copies.files.synced(copy)

    def _large_writes_done(self, copy: Copy, intents: list[int]) -> None:
        """Notes in the journal that these need not be doubted after a crash; only as long as there is room."""
        if copy.gone or self._pipeline.error is not None:
            return
        if copy in self._applier.unnamed:  # the journal could have to make the file anew
            self._applier.unnamed_intents.setdefault(copy, []).extend(intents)
            return
        for lsn in intents:
            self._pipeline.note_done(copy, lsn)

    def _journal_switched(self) -> None:
        self._checkpoints.begin(self._pipeline)

    def _journal_failed(self, error: OSError) -> None:
        directory = self._last_journal.directory
        text = f"journal in {directory}: {error.strerror or error}"
        self._log(2, f"{text}: this node cannot store any more")
        self._pipeline.fail(DiskError(text))
        self._on_disk_failure(directory, text, True)


def ignore(error: StoreError | None) -> None:
    """A sync that nobody waits for; its failure takes the disk out of service all the same."""
