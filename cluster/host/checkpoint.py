"""Checkpoints: make what a journal segment says true in the object files, so that the segment can be used again.

The order for one copy: bytes of large writes are on the disk before a trailer with their hashes is written (a crash in
between must leave either the old hash or bytes that fit the new one), then the trailer, then a sync of both. With
`nosync` one sync is for both: what that order protects from is a loss of power, where the other copies count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.limits import CHECKPOINT_PARALLEL
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.applier import Applier
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import is_no_room
from sheepdog.cluster.host.journal import Journal
from sheepdog.cluster.host.no_room import NoRoom
from sheepdog.cluster.host.object_file import Copy, seal_trailer, write_sealed
from sheepdog.cluster.host.pipeline import Pipeline
from sheepdog.cluster.host.records import RecordKind
from sheepdog.cluster.host.syncs import DirectorySyncs, FileSyncs, gather


class Checkpoints:
    """Runs one checkpoint at a time; `finished` is called after each."""

    def __init__(
        self,
        copies: Copies,
        journal: Journal,
        applier: Applier,
        syncs: FileSyncs,
        directories: DirectorySyncs,
        no_room: NoRoom,
    ) -> None:
        self._copies = copies
        self._journal = journal
        self._applier = applier
        self._syncs = syncs
        self._directories = directories
        self._no_room = no_room
        self.running = False
        self.count = 0
        self._done: list[Callable[[], None]] = []

    def begin(self, pipeline: Pipeline) -> None:
        """The journal has just gone on to its other segment: brings everything before that into place."""
        self.running = True
        boundary = self._journal.segment_start
        pipeline.barrier(lambda: self._settle_all(pipeline, boundary))

    def when_done(self, call: Callable[[], None]) -> None:
        if self.running:
            self._done.append(call)
        else:
            call()

    def _settle_all(self, pipeline: Pipeline, boundary: int) -> None:
        batch = list(self._applier.touched)
        self._applier.touched.clear()
        batch.reverse()
        left = min(CHECKPOINT_PARALLEL, len(batch)) + 1

        def ended(error: StoreError | None = None) -> None:
            # A failed disk is out of service; the others' copies do not need the segment any more.
            nonlocal left
            left -= 1
            if left == 0:
                self._sync_names(pipeline, boundary)

        def step(error: StoreError | None = None) -> None:
            while batch:
                copy = batch.pop()
                if _is_open(copy):  # else `settle` would be done at once, each a call inside of the last one's
                    self.settle(copy, step)
                    return
            ended()

        for _ in range(left - 1):
            step()
        ended()

    def _sync_names(self, pipeline: Pipeline, boundary: int) -> None:
        unnamed = list(self._applier.unnamed)
        homes = [home for home in self._copies.homes if self._directories.is_needed(home) and not home.failed]
        gather(
            [partial(self._directories.sync, home) for home in homes],
            lambda error: self._record(pipeline, boundary, unnamed),
        )

    def _record(self, pipeline: Pipeline, boundary: int, named: list[Copy]) -> None:
        for copy in named:
            self._applier.unnamed.pop(copy, None)
            self._applier.unnamed_intents.pop(copy, None)
        self._journal.append(RecordKind.CHECKPOINT, offset=boundary)
        lsn = self._journal.position

        def durable(error: StoreError | None) -> None:
            if error is None:
                self._journal.release()
            self.running = False
            self.count += 1
            calls, self._done = self._done, []
            for call in calls:
                call()
            pipeline.drain()

        pipeline.when_synced(lsn, durable)

    def settle(self, copy: Copy, done: Done) -> None:
        """Trailer and bytes of what is in the copy's file now are on the disk at `done`."""
        if not _is_open(copy):
            done(None)
            return
        flags = trailer.RESTORING if copy.restoring else 0
        copy.pins += 1
        copy.touched = False
        if copy.trailer_of == copy.changes and not copy.restoring:  # nothing has changed since the file was made
            self._syncs.sync(copy, partial(self._settled, copy, done))
            return
        if not copy.intents and copy.running is None:
            self._write_trailer(copy, seal_trailer(copy, flags), done)
            return
        sealed = bytes(seal_trailer(copy, flags))
        writes = copy.trailer_writes

        def synced(error: StoreError | None) -> None:
            if error is not None or copy.void:
                self._settled(copy, done, error)
            elif copy.trailer_writes != writes:  # a newer one has been written meanwhile
                self._syncs.sync(copy, partial(self._settled, copy, done))
            else:
                self._write_trailer(copy, sealed, done)

        self._syncs.sync(copy, synced)

    def _write_trailer(self, copy: Copy, sealed: bytes | bytearray, done: Done) -> None:
        try:
            write_sealed(self._copies.disk, copy, sealed)
        except OSError as error:
            if is_no_room(error) and not copy.home.failed:  # of a file system that never writes in place
                copy.pins -= 1
                self._applier.touch(copy)
                self._no_room.wait(copy.home, error, lambda: self.settle(copy, done))
            else:
                self._settled(copy, done, self._copies.fail(copy.home, error, promised=True))
            return
        self._syncs.sync(copy, partial(self._settled, copy, done))

    def _settled(self, copy: Copy, done: Done, error: StoreError | None) -> None:
        copy.pins -= 1
        if not copy.touched:
            self._applier.touched.pop(copy, None)
        if copy.gone:
            self._copies.files.close_if_unused(copy)
        done(error)


def _is_open(copy: Copy) -> bool:
    """Otherwise there is nothing to bring into its file, or nobody to do it: only what is clean is closed."""
    return not copy.void and not copy.home.failed and copy.fd >= 0
