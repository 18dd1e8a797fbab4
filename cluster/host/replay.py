"""Making the records of the journal true in the object files, after a crash.

Replaying twice gives the same as once, and a crash in the middle of it changes nothing: the journal is written again
only when everything is on the disk. For each block the newest record counts. A large write whose bytes did not get to
the disk leaves the block as it was before; the copy then gets a version of its own (`torn_version`), because its
bytes are equal to no other copy's. It is below that of the oldest write that is not here, since another copy may have
that one and not the newest; unless the journal itself has the bytes of a later change, which may be durable here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import NO_VERSION, VERSION_STEP_BITS, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory, is_no_room, open_if_there, write_all
from sheepdog.cluster.host.journal_scan import Found
from sheepdog.cluster.host.object_file import Copy, write_trailer
from sheepdog.cluster.host.records import Parsed, RecordKind, cut_blocks
from sheepdog.cluster.host.trailer import FIRST_ENTRY, ZERO_BLOCK, block_count, hash_of

VERSION_GAP: Final = 1 << VERSION_STEP_BITS  # home counts in these steps; what lies between belongs to torn copies


def torn_version(version: Version, random_number: int) -> Version:
    """A version below the given one and above all older ones, equal to no other copy's; itself without room."""
    if version.counter < VERSION_GAP or version.counter % VERSION_GAP:
        return version
    part = 1 + random_number % (VERSION_GAP - 1)
    return Version(version.epoch, version.term, version.counter - VERSION_GAP + part)


class _Candidate:
    """What a block may hold: bytes of the journal, a hole, or what the file has if it fits the hash."""

    __slots__ = ("certain", "data", "hash", "lsn", "version")

    def __init__(
        self, lsn: int, value: int, data: memoryview | bytes | None, certain: bool, version: Version = NO_VERSION
    ) -> None:
        self.lsn = lsn
        self.version = version
        self.hash = value
        self.data = data  # None: the bytes are in the file, if anywhere
        self.certain = certain


class _Plan:
    """What one object has to become. `base`: what the records start from."""

    __slots__ = ("base", "blocks", "certain", "size", "version")

    def __init__(self) -> None:
        self.certain = 0  # lsn of the newest change that is here whatever the file has
        self.base = "file"  # or "holes", "none", "restoring", "restored"
        self.size = 0
        self.version: Version | None = None
        self.blocks: dict[int, list[_Candidate]] = {}  # oldest first; only the first may be certain

    def put(self, block: int, candidate: _Candidate) -> None:
        if candidate.certain:
            self.blocks[block] = [candidate]
        else:
            self.blocks.setdefault(block, []).append(candidate)

    def add(self, record: Parsed, found: Found) -> None:
        kind = record.kind
        if kind == RecordKind.DONE:
            self._done(record.offset)
            return
        self.size = record.size
        if kind not in (RecordKind.INTENT, RecordKind.CREATE_LARGE):
            self.certain = record.lsn
        if kind in (RecordKind.CREATE, RecordKind.CREATE_LARGE):
            self.base = "holes"
            self.blocks.clear()
            self.version = record.version
            self._bytes(record, found)
        elif kind in (RecordKind.REMOVE, RecordKind.RESTORE, RecordKind.RESTORED):
            names = {RecordKind.REMOVE: "none", RecordKind.RESTORE: "restoring", RecordKind.RESTORED: "restored"}
            self.base = names[kind]
            self.blocks.clear()
            self.version = record.version
        elif kind in (RecordKind.WRITE, RecordKind.INTENT):
            self.version = record.version
            self._bytes(record, found)
        elif kind == RecordKind.PUNCH:
            self.version = record.version
            self._punch(record, found)

    def _bytes(self, record: Parsed, found: Found) -> None:
        payload = found.payload(record) if record.payload_length else None
        first = record.offset >> 12
        for index, value in enumerate(record.hashes):
            if not value:
                self.put(first + index, _Candidate(record.lsn, 0, ZERO_BLOCK, True))
                continue
            data = None if payload is None else payload[index << 12 : (index + 1) << 12]
            self.put(first + index, _Candidate(record.lsn, value, data, data is not None, record.version))

    def _punch(self, record: Parsed, found: Found) -> None:
        payload = found.payload(record)
        cut = cut_blocks(record.offset, record.length, record.size)
        first = record.offset >> 12
        last = record.offset + record.length + BLOCK_SIZE - 1 >> 12
        for block in range(first, last):
            if block in cut:
                index = cut.index(block)
                value = record.hashes[index]
                data = payload[index << 12 : (index + 1) << 12]
                self.put(block, _Candidate(record.lsn, value, data if value else ZERO_BLOCK, True))
            else:
                self.put(block, _Candidate(record.lsn, 0, ZERO_BLOCK, True))

    def _done(self, lsn: int) -> None:
        """The large write of `lsn` is on the disk: nothing older counts for its blocks."""
        self.certain = max(self.certain, lsn)
        for block, candidates in self.blocks.items():
            for index, candidate in enumerate(candidates):
                if candidate.lsn == lsn:
                    candidate.certain = True
                    self.blocks[block] = candidates[index:]
                    break


@dataclass(slots=True)
class Report:
    """What a replay did."""

    records: int = 0
    objects: int = 0
    blocks: int = 0
    missing: int = 0
    torn: list[ObjectId] = field(default_factory=list)


def replay(
    copies: Copies,
    found: Found,
    log: Log,
    random_bytes: Callable[[int], bytes] = os.urandom,
    disk_missing: bool = False,
) -> Report:
    """Makes the records true and durable; blocks. OSError of the journal's or META's disk only.

    `disk_missing`: a disk is not here any more; what it held gets no version unless the journal has all its bytes.

    UsageError when a disk is full; replaying again after that is as good as the first time.
    """
    report = Report(records=len(found.records))
    plans: dict[ObjectId, _Plan] = {}
    for record in found.records:
        plans.setdefault(record.oid, _Plan()).add(record, found)
    for oid, plan in sorted(plans.items()):
        copy = copies.by_oid.get(oid)
        home = copy.home if copy is not None else copies.home_for(oid)
        if home is None or home.failed:
            continue
        try:
            if _Redo(copies, oid, plan, report, random_bytes, log, disk_missing).run():
                report.objects += 1
        except OSError as error:
            _failed(copies, home, error)
    for home in copies.homes:
        try:
            if not home.failed:
                home.sync()
        except OSError as error:
            _failed(copies, home, error)
    _tell_unreadable(copies, log)
    if found.records:
        log(
            5,
            f"journal: {report.records} records replayed into {report.objects} objects, {report.blocks} blocks written,"
            f" {report.missing} for objects that are gone, {len(report.torn)} objects with an unfinished large write",
        )
    return report


def _tell_unreadable(copies: Copies, log: Log) -> None:
    """Copies with which the journal could not help: not those whose trailers a crash came before."""
    for home in copies.homes:
        for oid, reason in home.take_unreadable().items():
            copy = copies.by_oid.get(oid)
            if copy is not None and copy.home is home and copy.size < 0:
                log(3, f"{copy.path}: {reason}; the copy needs a restore")


def _failed(copies: Copies, home: ObjectDirectory, error: OSError) -> None:
    """A full disk must not cost what the journal has: UsageError, and the next start replays it."""
    if is_no_room(error):
        raise UsageError(f"{home.path} has no room for what is in the journal: make some and start again")
    copies.fail(home, error, promised=True)


def gaps(blocks: Iterable[int], count: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, end) of the `count` blocks that are not among `blocks`."""
    first = 0
    for block in (*sorted(block for block in blocks if block < count), count):
        if first < block:
            yield first, block
        first = block + 1


class _Redo:
    """Brings one object to its plan."""

    def __init__(
        self,
        copies: Copies,
        oid: ObjectId,
        plan: _Plan,
        report: Report,
        random_bytes: Callable[[int], bytes],
        log: Log,
        disk_missing: bool,
    ) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._oid = oid
        self._plan = plan
        self._report = report
        self._random = random_bytes
        self._log = log
        self._disk_missing = disk_missing
        self._torn: list[int] = []
        self._missing: _Candidate | None = None  # of the oldest write behind `_Plan.certain` that is not in the file
        self._absent = False  # bytes that were on the disk are not in the file
        self._found_there = False  # bytes that count are in the file alone
        self._unknown: list[int] = []

    def run(self) -> bool:
        plan, copies = self._plan, self._copies
        copy = copies.by_oid.get(self._oid)
        was_elsewhere = copy is None and self._disk_missing
        if plan.base == "none":
            if copy is not None:
                self._disk.unlink(copy.path)
                copies.replace(self._oid, None)
            return copy is not None
        if plan.base == "holes" and (copy is None or copy.size != plan.size):
            copy = self._adopt(copy) or self._make(copy)
        if plan.base == "restoring" and copy is None:
            copy = self._make(None)  # its name was lost; that there is a copy must not be
        if copy is None or copy.size < 0 or (plan.base != "holes" and copies.open_now(copy) is not None):
            self._report.missing += 1
            return False
        if copies.open_now(copy) is not None:  # an unreadable header, but the journal has all that it says
            copy = self._adopt(copy) or self._make(copy)
        assert plan.version is not None or plan.base == "file"
        if plan.base == "restoring" or (plan.base == "file" and copy.restoring) or plan.version == NO_VERSION:
            self._leave_restoring(copy)
            return True
        if plan.version is None:
            return False  # nothing but notes about large writes
        self._bring_blocks(copy)
        if was_elsewhere and (self._torn or self._absent):
            self._leave_restoring(copy)
        else:
            self._finish(copy)
        return True

    def _adopt(self, old: Copy | None) -> Copy | None:
        """The object's file without looking at its header, if it has the right length."""
        if old is None:
            return None
        size = self._plan.size
        fd = open_if_there(self._disk, old.path, os.O_RDWR)
        if fd is None:
            return None
        if self._disk.info(fd).length != trailer.trailer_offset(size) + trailer.trailer_size(size):
            self._disk.close(fd)
            return None
        copy = Copy(self._oid, size, NO_VERSION, old.home)
        copy.allocated = old.allocated
        copy.attach(fd, bytearray(trailer.trailer_size(size)))
        self._copies.replace(self._oid, copy)
        return copy

    def _make(self, old: Copy | None) -> Copy:
        """A file of holes in the object's place."""
        copies, plan = self._copies, self._plan
        home = old.home if old is not None else copies.home_for(self._oid)
        assert home is not None
        copy = Copy(self._oid, plan.size, NO_VERSION, home)
        copy.gone = True
        path = home.new_path(self._oid)
        copy.attach(
            self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), bytearray(trailer.trailer_size(plan.size))
        )
        write_trailer(self._disk, copy, trailer.RESTORING)
        self._disk.fdatasync(copy.fd)
        self._disk.rename(path, copy.path)
        copies.replace(self._oid, copy)
        return copy

    def _leave_restoring(self, copy: Copy) -> None:
        copy.version = copy.applied = NO_VERSION
        copy.restoring = True
        copy.trusted = False
        write_trailer(self._disk, copy, trailer.RESTORING)
        self._disk.fdatasync(copy.fd)

    def _bring_blocks(self, copy: Copy) -> None:
        plan = self._plan
        if plan.base == "holes":
            hole = _Candidate(0, 0, ZERO_BLOCK, True)
            for candidates in plan.blocks.values():
                if not candidates[0].certain:
                    candidates.insert(0, hole)
            for first, end in gaps(plan.blocks, block_count(plan.size)):
                if not self._is_hole(copy, first, end):
                    plan.blocks.update((block, [hole]) for block in range(first, end))
        for block in sorted(plan.blocks):
            if block < block_count(copy.size):
                self._bring(copy, block, plan.blocks[block])

    def _is_hole(self, copy: Copy, first: int, end: int) -> bool:
        """Known without reading the blocks: most of a thin object's are not there, and there may be many objects."""
        entries = copy.entries[FIRST_ENTRY + first : FIRST_ENTRY + end]
        return not any(entries) and self._disk.is_hole(copy.fd, first << 12, (end - first) << 12)

    def _bring(self, copy: Copy, block: int, candidates: list[_Candidate]) -> None:
        """The newest candidate that can be had; then the block as it was."""
        entry = FIRST_ENTRY + block
        present = bytearray(BLOCK_SIZE)
        self._disk.preadv(copy.fd, [present], block << 12)
        found = hash_of(present)
        doubted = False
        for candidate in reversed(candidates):
            if candidate.data is not None:
                self._write(copy, block, present, candidate)
            elif found != candidate.hash and not candidate.certain:
                doubted = True
                self._torn.append(block)
                if candidate.lsn > self._plan.certain and (self._missing is None or candidate.lsn < self._missing.lsn):
                    self._missing = candidate
                continue
            elif found != candidate.hash and doubted:
                break  # cut by the newer write
            self._absent |= candidate.data is None and found != candidate.hash
            self._found_there |= candidate.data is None
            copy.entries[entry] = candidate.hash
            return
        if found != copy.entries[entry] and (copy.entries[entry] or present != ZERO_BLOCK):
            self._unknown.append(block)
            self._found_there = True
            copy.entries[entry] = found

    def _write(self, copy: Copy, block: int, present: bytearray, candidate: _Candidate) -> None:
        assert candidate.data is not None
        if not candidate.hash:
            if copy.entries[FIRST_ENTRY + block] or present != ZERO_BLOCK:
                self._disk.punch(copy.fd, block << 12, BLOCK_SIZE)
                self._report.blocks += 1
        elif bytes(present[: len(candidate.data)]) != bytes(candidate.data):
            write_all(self._disk, copy.fd, candidate.data, block << 12)
            self._report.blocks += 1

    def _finish(self, copy: Copy) -> None:
        version = self._plan.version
        assert version is not None
        if self._torn:
            lacked = version if self._missing is None else self._missing.version
            version = torn_version(lacked, int.from_bytes(self._random(8), "little"))
            self._report.torn.append(self._oid)
        if self._unknown:
            # Neither the old nor the new bytes of an unfinished large write: whole sectors of both (design: P4 above
            # 512 bytes). Another copy is preferred; without one these bytes are what is left.
            self._log(4, f"{copy.path}: blocks {self._unknown} hold parts of an unfinished write, hashed anew")
        if self._found_there:  # after a further crash the table must not name what is not there; the rest comes again
            self._disk.fdatasync(copy.fd)
        copy.version = copy.applied = version
        copy.restoring = False
        write_trailer(self._disk, copy)
        self._disk.fdatasync(copy.fd)
