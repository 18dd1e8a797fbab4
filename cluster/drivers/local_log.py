"""The shared log of the local driver: one file, a header and records behind it.

Writers hold the driver's lock; readers need none. A record counts once the header, written last, covers it: what a
writer that was killed in between left behind is overwritten by the next. Positions grow for ever; space below every
reader's position is given back as a hole. Nothing is synced: a reboot ends all members and with them what the log says.

    header   at 0      magic 8s, version u32, generation, end, trimmed, sequence, incarnation u64 each, crc32 u32
    records  from 4096 data length u32, crc32 of the rest u32, sequence u64, incarnation u64, kind u32, data
"""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

_HEADER = struct.Struct("<8sI5Q")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<IIQQI")
_MAGIC = b"SHEEPLOG"
_VERSION = 1
DATA_START = 4096  # records begin on a page, so that holes can be punched from there on
READ_BYTES = 4 << 20  # read at once: more than the largest record, little enough not to hold up the loop
HEADER_TRIES = 5  # a header read while it is written may be torn; the second read is whole
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


class Damaged(Exception):
    """The log is not what its writers left: a person removed, replaced or overwrote it."""


class RecordKind(IntEnum):
    JOIN = 1  # data: the member (local_members.MemberCard)
    LEAVE = 2
    MESSAGE = 3


class Record(NamedTuple):
    sequence: int
    incarnation: int  # of the member that joins, leaves or sends
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    generation: int = 0  # raised when a first member finds nobody alive
    end: int = DATA_START  # records are valid below this position
    trimmed: int = DATA_START  # positions below may be holes
    sequence: int = 0  # of the newest record ever, over all generations
    incarnation: int = 0  # the newest one given out


class EventLog:
    """The log file. Every method that changes it must be called with the driver's lock held."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def open(self) -> None:
        """Opens or creates the file, once; a file of another program is moved to `FILE.old`, not overwritten."""
        if self._fd >= 0:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        start = os.pread(self._fd, len(_MAGIC), 0)
        if start.strip(b"\0") and start != _MAGIC:
            os.rename(self._path, self._path + ".old")
            os.close(self._fd)
            self._fd = os.open(self._path, flags, 0o600)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def touch(self) -> None:
        """Renews the time stamps, so that programs that tidy up /tmp leave the file alone."""
        os.utime(self._fd)

    def in_place(self) -> bool:
        """Whether the path still names the open file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return False

    def read_header(self) -> Header | None:
        """None: no valid header (new file, or power failed while it was written)."""
        size = _HEADER.size + _CRC.size
        for _ in range(HEADER_TRIES):
            raw = os.pread(self._fd, size, 0)
            if len(raw) == size and zlib.crc32(raw[: _HEADER.size]) == _CRC.unpack_from(raw, _HEADER.size)[0]:
                magic, version, *fields = _HEADER.unpack_from(raw)
                if magic == _MAGIC and version == _VERSION:
                    return Header(*fields)
        return None

    def write_header(self, header: Header) -> None:
        raw = _HEADER.pack(
            _MAGIC,
            _VERSION,
            header.generation,
            header.end,
            header.trimmed,
            header.sequence,
            header.incarnation,
        )
        os.pwrite(self._fd, raw + _CRC.pack(zlib.crc32(raw)), 0)

    def reset(self, old: Header | None) -> Header:
        """A new generation with no records; sequence and incarnations go on."""
        old = old or Header()
        header = replace(old, generation=old.generation + 1, end=DATA_START, trimmed=DATA_START)
        self.write_header(header)  # before truncating: a kill in between loses no number
        os.ftruncate(self._fd, DATA_START)
        return header

    def append(self, header: Header, entries: Sequence[tuple[RecordKind, int, bytes]]) -> Header:
        """Adds (kind, incarnation, data) records; all of them count, or none. OSError: none does."""
        chunks: list[bytes] = []
        sequence = header.sequence
        for kind, incarnation, data in entries:
            sequence += 1
            head = _RECORD.pack(len(data), 0, sequence, incarnation, kind)
            crc = zlib.crc32(data, zlib.crc32(head[8:]))
            chunks += (head[:4], _CRC.pack(crc), head[8:], data)
        blob = b"".join(chunks)
        self._write(blob, header.end)
        header = replace(header, end=header.end + len(blob), sequence=sequence)
        self.write_header(header)
        return header

    def _write(self, blob: bytes, position: int) -> None:
        view = memoryview(blob)
        while view:  # a full disk writes a part before it fails
            written = os.pwrite(self._fd, view, position)
            view, position = view[written:], position + written

    def read(self, position: int, end: int) -> tuple[list[Record], int]:
        """Whole records from `position`, at most READ_BYTES of them, and the position behind them; Damaged."""
        raw = os.pread(self._fd, min(end - position, READ_BYTES), position)
        records: list[Record] = []
        at = 0
        while at + _RECORD.size <= len(raw):
            length, crc, sequence, incarnation, kind = _RECORD.unpack_from(raw, at)
            stop = at + _RECORD.size + length
            if stop > len(raw):
                break
            if zlib.crc32(memoryview(raw)[at + 8 : stop]) != crc:
                raise Damaged(f"{self._path}: bad record at {position + at}")
            records.append(Record(sequence, incarnation, kind, raw[at + _RECORD.size : stop]))
            at = stop
        if not records and position < end:
            raise Damaged(f"{self._path}: cut off at {position}")
        return records, position + at

    def trim(self, header: Header, floor: int) -> Header:
        """Gives back the space below `floor`; without effect on a file system that cannot."""
        if floor <= header.trimmed or not _punch_hole(self._fd, header.trimmed, floor - header.trimmed):
            return header
        header = replace(header, trimmed=floor)
        self.write_header(header)
        return header


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0)
