"""The way of a change: journal -> durable -> object file.

Records go through in one order. A change is seen by reads from the moment it is submitted (`Copy.pending`); it is
acknowledged when its record is in the operating system's hands, or on the disk when it asked for that; its bytes go
to the object's file only then, because the kernel writes pages back when it likes. With `nosync` nothing waits for the
disk: the file gets the bytes as soon as the record is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from sheepdog.cluster.core.errors import DiskError, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, NO_VID, Vid, vid_of
from sheepdog.cluster.core.limits import OVERLAY_AGE_NS, OVERLAY_LIMIT_BYTES, OVERLAY_SYNC_BYTES
from sheepdog.cluster.core.ports import Clock, Done
from sheepdog.cluster.host.applier import Applier
from sheepdog.cluster.host.journal import Journal
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.records import Record, RecordKind, record_size

AtEnd: TypeAlias = Callable[[Callable[[], None]], None]
"""Calls once at the end of the loop's present turn, on the loop's thread."""


LOOKS_BEFORE_SYNC: Final = 2  # of a microsecond where nobody comes; more, and those who wait wait longer


class Pipeline:
    """Owns the order of changes. `switched` is called when the journal has gone on to its other segment."""

    def __init__(
        self,
        journal: Journal,
        applier: Applier,
        at_end: AtEnd,
        after_look: AtEnd,
        clock: Clock,
        nosync: bool,
        switched: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._applier = applier
        self._at_end = at_end
        self._after_look = after_look
        self._clock = clock
        self._nosync = nosync
        self._switched = switched
        self._backlog: deque[Record] = deque()  # no room in the journal yet
        self._written: list[Record] = []  # appended in this turn
        self._unapplied: deque[Record] = deque()  # appended, not handed to the applier
        self._overlay_bytes = 0
        self._replacing = 0  # records in the backlog that remove or replace a copy
        self._ends: dict[Vid, int] = {}  # lsn behind the last record of a vid, of records that may not be durable;
        self._newest: Vid = NO_VID  # but for the vid of the newest record: mostly it is the next one's, too
        self._newest_end = 0
        self._flushes: list[tuple[int, Done]] = []
        self._scheduled = False
        self._sync_wanted = False  # somebody waits for the next sync, or it is time for one
        self._timer_set = False
        self._looks = 0  # at the sockets, since a sync is wanted that can be begun
        self.error: StoreError | None = None

    # Coming in

    def submit(self, record: Record) -> None:
        """Takes a change; the copy stays open until it is in its file. Reads see it from now on."""
        if self.error is not None:
            if record.done is not None:
                record.done(self.error)
            return
        copy = record.copy
        if copy.gone and record.kind not in (RecordKind.REMOVE, RecordKind.DONE):
            self.answer_behind(record)  # it waited for the file while the object was replaced
            return
        copy.pins += 1
        if record.count:
            pending = copy.pending
            for block in range(record.first, record.first + record.count):
                pending[block] = record
        if self._backlog or not self._make_room(record):
            self._backlog.append(record)
            self._replacing += record.replaces is not None
        else:
            self._append(record)

    def _make_room(self, record: Record) -> bool:
        """May it be appended now? Goes on in the journal's other segment where this one is full, or has had enough."""
        if self._overlay_bytes > OVERLAY_LIMIT_BYTES:
            self.want_sync()
            return False
        journal = self._journal
        size = record_size(len(record.hashes), len(record.data) if record.carries_data else 0)
        has_room = journal.has_room(size)
        if has_room and not journal.has_enough():
            return True
        if not journal.can_switch():
            return has_room
        journal.switch()
        self._switched()
        return True

    def _append(self, record: Record) -> None:
        journal, copy = self._journal, record.copy
        record.lsn = journal.position
        if record.replaces is not None:
            self._applier.make_void(record.replaces)
        record.end = journal.append(
            record.kind,
            copy.oid,
            max(copy.size, 0),  # less: the copy is lost since its disk is out of service
            record.offset,
            record.length,
            record.version,
            record.hashes,
            record.data if record.carries_data else b"",
        )
        self._written.append(record)
        self._unapplied.append(record)
        vid = vid_of(copy.oid)
        if vid != self._newest:
            self._ends[self._newest] = self._newest_end
            self._newest = vid
        self._newest_end = record.end
        if not self._nosync:
            self._overlay_bytes += len(record.data)
            if record.durable or record.kind == RecordKind.INTENT or self._overlay_bytes > OVERLAY_SYNC_BYTES:
                self._sync_wanted = True
            elif not self._timer_set:
                self._timer_set = True
                self._clock.after(OVERLAY_AGE_NS, self._aged)
        self._schedule()

    def answer_behind(self, record: Record) -> None:
        """Answers what a copy was asked for that is replaced or removed now: when that is as durable as this asks.

        Earlier would be too early: a crash could bring the object back as it was before both.
        """
        done, record.done = record.done, None
        self.submit(Record(RecordKind.DONE, record.copy, 0, 0, 0, [], b"", NO_VERSION, record.durable, done))

    def note_done(self, copy: Copy, lsn: int, done: Done | None = None) -> None:
        """The large write of `lsn` (0: none) is on the disk; durable at `done`, as everything submitted before.

        Nobody may be told that a large write is durable before that: a later one cut by a crash could else make
        replay go back to what was before both.
        """
        if done is not None and copy.size < 0:
            done(DiskError(f"{copy.home.path}: the disk has gone out of service"))
            return
        record = Record(RecordKind.DONE, copy, 0, 0, 0, [], b"", NO_VERSION, done is not None, done)
        record.offset = lsn
        self.submit(record)

    def barrier(self, call: Callable[[], None]) -> None:
        """Calls when everything submitted before the journal's last switch is in the files."""
        self._applier.barriers.append((self._journal.segment_start, call))
        self.want_sync()

    def want_sync(self) -> None:
        self._sync_wanted = True
        self._schedule()

    def _aged(self) -> None:
        self._timer_set = False
        if self._unapplied and not self._nosync:
            self._sync_wanted = True
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._at_end(self._turn_ends)

    def _turn_ends(self) -> None:
        """One write for all records of the turn, then one sync for all that wait; both in one where that can be.

        Those share a sync, too, whose records have arrived since the turn began.
        """
        self._scheduled = False
        journal = self._journal
        if journal.writing_through or (self._sync_wanted and journal.must_wait()):
            return  # `_synced` goes on
        if self._sync_wanted and self._looks < LOOKS_BEFORE_SYNC and not journal.syncing:
            self._looks += 1
            self._scheduled = True
            self._after_look(self._turn_ends)
            return
        self._looks = 0
        if self._sync_wanted and journal.can_write_through():
            self._sync_wanted = False
            self._written.clear()  # `_synced` answers them
            journal.write_through(self._synced)
            return
        if not journal.write_out():
            return
        written, self._written = self._written, []
        wanted, self._sync_wanted = self._sync_wanted, False  # who comes from here on is not in what was just written
        nosync = self._nosync
        for record in written:
            if record.done is not None and (nosync or not record.durable) and record.acked_by_journal:
                done, record.done = record.done, None
                done(None)
        if nosync:
            self._at_end(self._apply_written)  # the answers, asked for just now, leave first
        if wanted and journal.syncing:
            self._sync_wanted = True
        elif wanted and not journal.dead:
            journal.sync(self._synced)

    def _synced(self) -> None:
        synced = self._journal.synced
        answers = []
        for record in self._unapplied:
            if record.end > synced:
                break
            if record.done is not None and record.acked_by_journal:
                answers.append(record.done)
                record.done = None
        for done in answers:
            done(None)
        if self._flushes:
            covered = [done for lsn, done in self._flushes if lsn <= synced]
            self._flushes = [(lsn, done) for lsn, done in self._flushes if lsn > synced]
            for done in covered:
                done(None)
        self._at_end(self._apply_synced)  # the answers, asked for just now, leave first
        if self._sync_wanted or self._written:
            self._schedule()

    def _apply_written(self) -> None:
        self._apply_until(self._journal.written)

    def _apply_synced(self) -> None:
        self._apply_until(self._journal.synced)
        self.drain()

    def _apply_until(self, lsn: int) -> None:
        unapplied, applier = self._unapplied, self._applier
        while unapplied and unapplied[0].end <= lsn:
            record = unapplied.popleft()
            if not self._nosync:
                self._overlay_bytes -= len(record.data)
            applier.apply(record)
        if not unapplied and not self._backlog:
            self._newest_end = 0
            if self._ends:
                self._ends.clear()
        applier.reached(unapplied[0].lsn if unapplied else self._journal.position)

    def drain(self) -> None:
        """Appends what waited for room."""
        while self._backlog and self._make_room(self._backlog[0]):
            record = self._backlog.popleft()
            self._replacing -= record.replaces is not None
            self._append(record)

    # Durability

    def flush(self, vids: frozenset[Vid] | None, done: Done) -> None:
        """Every record appended so far for these vids (None: all) is durable at `done`."""
        if self.error is not None:
            done(self.error)
            return
        if self._replacing:  # nobody syncs the files of copies that go, and the journal does not have yet that they do
            last_one = self._backlog[-1].copy
            self.submit(Record(RecordKind.DONE, last_one, 0, 0, 0, [], b"", NO_VERSION, True, done))
            return
        known = self._ends
        known[self._newest] = self._newest_end
        ends = known.values() if vids is None else [known[vid] for vid in vids if vid in known]
        lsn = max(ends, default=0)
        if lsn <= self._journal.synced:
            done(None)
            return
        self._flushes.append((lsn, done))
        self.want_sync()

    def when_synced(self, lsn: int, done: Done) -> None:
        """`lsn` of the journal is on the disk at `done`, with `nosync` too."""
        if self.error is not None:
            done(self.error)
        else:
            self._flushes.append((lsn, done))
            self.want_sync()

    def fail(self, error: DiskError) -> None:
        """The journal is gone: whoever waits learns it, and nothing goes through any more."""
        self.error = error
        waiting = [record.done for record in (*self._unapplied, *self._backlog) if record.done is not None]
        waiting += [done for _, done in self._flushes]
        self._unapplied.clear()
        self._backlog.clear()
        self._written.clear()
        self._flushes.clear()
        for done in waiting:
            done(error)
