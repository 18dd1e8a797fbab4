"""Reading what a journal holds: the records that may not be in place, and whether all of it can be read."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Final

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.limits import JOURNAL_DAMAGE_BYTES, JOURNAL_READ_BYTES
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.directory import open_if_there
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.journal import NO_JOURNAL, SEGMENT_HEADER, SegmentHeader, decode_segment_header, segment_path
from sheepdog.cluster.host.records import RECORD_MAGIC, SEGMENT_SHIFT, Parsed, RecordKind, parse

_NOTHING: Final = memoryview(bytes(JOURNAL_READ_BYTES))
_MAGIC_BYTES: Final = RECORD_MAGIC.to_bytes(4, "little")
_MAGIC_OFFSET: Final = 8  # in a record


@dataclass(slots=True)
class Found:
    """What the journal holds: the records that may not be in place, in order."""

    records: list[Parsed] = field(default_factory=list)
    segments: dict[int, memoryview] = field(default_factory=dict)
    newest: int = 0  # number of a segment, of which there is none before 1
    journal_bytes: int = 0  # size of the journal as it is; 0: there is none
    directory: str = ""  # where it is
    journal: bytes = NO_JOURNAL  # its id
    incomplete: bool = False  # it is damaged, or was given up: this node has forgotten writes; the log says so
    orderly: bool = False  # the last run noted that everything is in the object files
    missing: str = ""  # why it cannot be read where one must be

    @property
    def next_number(self) -> int:
        """Of the segment that a start begins when all is in place. It leaves one out, so that from the moment when it
        is there neither of those found counts: one of them alone would not be replayed to the same."""
        return self.newest + 2 if self.newest else 1

    def payload(self, record: Parsed) -> memoryview:
        segment = self.segments[record.lsn >> SEGMENT_SHIFT]
        start = (record.lsn & (1 << SEGMENT_SHIFT) - 1) + record.payload_offset
        return segment[start : start + record.payload_length]


def scan(disk: Disk, directory: str, node: bytes, log: Log, journal: bytes | None = None) -> Found:
    """Reads both segments, those of other journals than `journal` left out (None: than that of the newest one).

    UsageError for a journal of another node, OSError.
    """
    found = Found(directory=directory)
    headers: list[tuple[SegmentHeader, memoryview]] = []
    for index in (0, 1):
        path = segment_path(directory, index)
        data = _read(disk, path)
        header = None if data is None else _read_header(data, path, found, log)
        if data is None or header is None:
            continue
        if header.node != node:
            raise UsageError(f"{path} belongs to another node ({header.node.hex()})")
        headers.append((header, data))
    if journal is None:
        journal = max((header.number, header.journal) for header, _ in headers)[1] if headers else NO_JOURNAL
    for header, data in headers:
        if header.journal == journal:
            found.journal = journal
            found.newest = max(found.newest, header.number)
            if header.size == len(data):
                found.segments[header.number] = data
                found.journal_bytes = 2 * header.size
    _find_records(found, log)
    return found


def _find_records(found: Found, log: Log) -> None:
    """Those of the segments that may not be in place."""
    # What an older one had was in place when the newest was begun, whose file may not have its length yet.
    numbers = sorted(number for number in found.segments if number >= found.newest - 1)
    scanned = [_scan_segment(found.segments[number], number) for number in numbers]
    everything = [record for records in scanned for record in records]
    in_place = max((record.offset for record in everything if record.kind == RecordKind.CHECKPOINT), default=0)
    for number, records in zip(numbers, scanned, strict=True):
        found.records += records
        ended = bool(records) and records[-1].kind == RecordKind.END
        if not ended and in_place < number + 1 << SEGMENT_SHIFT:
            damaged = _damaged_at(found.segments[number], number, everything)
            if damaged is not None:
                found.incomplete = True
                path = segment_path(found.directory, number & 1)
                log(2, f"{path}: it is damaged at byte {damaged}: later writes of this node are lost here")
            break  # what the next segment has was never durable
    ignored = (RecordKind.CHECKPOINT, RecordKind.END)
    found.records = [record for record in found.records if record.lsn >= in_place and record.kind not in ignored]


def _read(disk: Disk, path: str) -> memoryview | None:
    fd = open_if_there(disk, path)
    if fd is None:
        return None
    try:
        length = disk.info(fd).length
        if not length:
            return memoryview(b"")
        data = memoryview(mmap.mmap(-1, length))  # zeros that take no memory until they are touched
        for start in range(0, length, JOURNAL_READ_BYTES):
            piece = data[start : start + JOURNAL_READ_BYTES]
            if disk.preadv(fd, [piece], start) < len(piece):
                return data[:start]  # cut short: no segment of ours
            if piece == _NOTHING[: len(piece)]:
                break  # no record has so many zeros: what follows was never written in this segment's time
    finally:
        disk.close(fd)
    return data


def _read_header(data: memoryview, path: str, found: Found, log: Log) -> SegmentHeader | None:
    """None for a segment that was never begun, and for a rotten one: a header is an atom, a crash does not tear it."""
    try:
        header = decode_segment_header(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    if header is None and any(data[:SEGMENT_HEADER]):
        found.incomplete = True
        log(2, f"{path}: it is damaged at byte 0, its header: the writes of this node that it has are lost here")
    return header


def _scan_segment(data: memoryview, number: int) -> list[Parsed]:
    """Records up to the first that does not fit, or to the end: then the journal goes on in the next segment."""
    records: list[Parsed] = []
    position = SEGMENT_HEADER
    while (record := parse(data, position, number << SEGMENT_SHIFT | position)) is not None:
        records.append(record)
        position += record.total
        if record.kind == RecordKind.END:
            break
    return records


def _damaged_at(data: memoryview, number: int, valid: list[Parsed]) -> int | None:
    """Tells rot from a torn tail: a later record, here or in the next segment, that knew this place to be durable
    proves rot. `valid`: the records of both segments that can be reached."""
    position = SEGMENT_HEADER + sum(record.total for record in valid if record.lsn >> SEGMENT_SHIFT == number)
    lsn = number << SEGMENT_SHIFT | position
    if any(record.durable_lsn > lsn for record in valid if record.lsn > lsn) or _knew_better(data, position, lsn):
        return position
    return None


def _knew_better(data: memoryview, position: int, lsn: int) -> bool:
    """Is there a record behind the invalid one at `position` that knew it to be durable?"""
    raw = bytes(data[position : position + JOURNAL_DAMAGE_BYTES])
    at = raw.find(_MAGIC_BYTES, _MAGIC_OFFSET)
    while at >= 0:
        start = position + at - _MAGIC_OFFSET
        if start % 8 == 0:
            record = parse(data, start, lsn - position + start)
            if record is not None and record.durable_lsn > lsn:
                return True
        at = raw.find(_MAGIC_BYTES, at + 1)
    return False
