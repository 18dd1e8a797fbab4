"""Which journal is this node's last: META/journal (docs/format.md 5).

A journal may lie outside of META, on a disk that is not there at the next start, or that comes back long after. So a
note names the journal that may hold what the object files do not: only that one is replayed, wherever it is found, and
without it the node does not start unless it is told to give it up. The note is durable before the first record.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final, NamedTuple

from sheepdog.cluster.core.errors import Corrupt, UsageError
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.directory import read_file, write_file
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.journal import MAX_SEGMENT_BYTES, NO_JOURNAL, Journal
from sheepdog.cluster.host.journal_scan import Found, scan
from sheepdog.cluster.host.reserve import Reserve
from sheepdog.cluster.host.store_options import default_journal_bytes
from sheepdog.cluster.host.superblock import RandomBytes

_NAME: Final = "journal"
_HEAD = Struct("<8sII16sQI")  # magic, format, 1 if nothing is needed of it, its id, segment, bytes of the path
_MAGIC: Final = b"SHEEPLJN"
_FORMAT: Final = 1
_GIVE_UP: Final = "give it up with -j size=SIZE,skip"


class Note(NamedTuple):
    """What META/journal says."""

    directory: str  # where the journal is; META itself is ""
    journal: bytes  # its id
    segment: int  # it has this one, or a later one
    empty: bool  # after an orderly end: all that it had is in the object files


class LastJournal:
    """Of the node with `metadata`; `directory` is where the journal is to be from now on."""

    def __init__(self, disk: Disk, metadata: str, directory: str | None, log: Log) -> None:
        self.directory = directory or metadata
        self._disk = disk
        self._metadata = metadata
        self._log = log
        self._reserve = Reserve(disk, metadata)

    def find(self, node: bytes, skip: bool) -> Found:
        """What is to be replayed; with `skip` nothing, whatever there is.

        UsageError when the journal is not there, is of another node or of another format; OSError.
        """
        try:
            found = self.look(node)
        except UsageError as error:
            if not skip or not isinstance(error.__cause__, Corrupt):
                raise
            found = scan(self._disk, self.directory, node, self._log)
            found.missing = str(error)
        if found.missing and not skip:
            raise UsageError(f"{found.missing}, or {_GIVE_UP}")
        if skip and found.missing:
            self._log(4, f"{found.missing}: it is given up, as -j skip asks")
        elif skip and found.records:
            self._log(4, f"{len(found.records)} records of the journal are skipped, as -j skip asks")
        if skip:
            found.incomplete |= bool(found.missing or found.records)
            found.records.clear()
        return found

    def look(self, node: bytes) -> Found:
        """Like `find`, but that the journal is not there is only told, in `missing`."""
        note = self._read()
        if note is None:
            return scan(self._disk, self.directory, node, self._log)
        found = self._search(note, node)
        found.orderly = note.empty
        return found

    def _search(self, note: Note, node: bytes) -> Found:
        noted = note.directory or self._metadata
        for place in dict.fromkeys((noted, self.directory)):
            found = scan(self._disk, place, node, self._log, note.journal)
            if found.incomplete or found.newest >= note.segment:
                return found
        found = Found(newest=note.segment)
        if not note.empty:
            found.missing = (
                f"{noted}: the last journal of this node is not there, and may hold what its disks do not; "
                "bring it back (is it mounted?)"
            )
        return found

    def segment_bytes(self, found: Found, wanted: int) -> int:
        """Of each of its two files: half of what is wanted (0: as it was, or else by the free space). OSError."""
        size = wanted or found.journal_bytes or default_journal_bytes(self._disk.space(self.directory).free)
        return min(size // 2 & ~(BLOCK_SIZE - 1), MAX_SEGMENT_BYTES)

    def identity(self, found: Found, random_bytes: RandomBytes) -> bytes:
        """The id of the journal from now on: a new one if it was not in this place before."""
        if found.directory == self.directory and found.journal != NO_JOURNAL:
            return found.journal
        return random_bytes(16)

    def started(self, journal: Journal) -> None:
        """What was to be replayed is in the object files, and `journal` has begun, durably. OSError."""
        self._write(journal, False)

    def emptied(self, journal: Journal) -> None:
        """Everything in it is in the object files, durably."""
        try:
            self._write(journal, True)
        except OSError as error:  # then it is needed at the next start, where it says the same
            self._log(4, f"{self._metadata}/{_NAME}: {error.strerror or error}")

    def _write(self, journal: Journal, empty: bool) -> None:
        place = b"" if self.directory == self._metadata else os.fsencode(self.directory)
        head = _HEAD.pack(_MAGIC, _FORMAT, int(empty), journal.identity, journal.number, len(place))
        self._reserve.with_room(lambda: write_file(self._disk, self._metadata, _NAME, head + place))

    def _read(self) -> Note | None:
        """None before the first journal, and for a store of a version without notes."""
        path = f"{self._metadata}/{_NAME}"
        try:
            data = read_file(self._disk, path)
        except Corrupt as error:
            raise UsageError(
                f"{path}: {error}; if the last journal is in {self.directory}, remove this file"
            ) from error
        if data is None:
            return None
        if len(data) < _HEAD.size or data[:8] != _MAGIC:
            raise UsageError(f"{path}: not a file of this system")
        _, form, empty, journal, segment, length = _HEAD.unpack_from(data)
        if form != _FORMAT:
            raise UsageError(f"{path}: format {form}, this version reads {_FORMAT}")
        if len(data) != _HEAD.size + length:
            raise UsageError(f"{path}: a note of the wrong length")
        return Note(os.fsdecode(data[_HEAD.size :]), journal, segment, bool(empty))
