"""How the strips of this node can go back to where they were before writes that may not be everywhere.

A write of an erasure-coded object changes several strips. If nodes die while it is on its way, some strips have it and
others have not, and nothing can be decoded from strips of different versions. So each strip keeps the bytes that a
write replaced until the home says that all strips have it (the watermark); until then it can be taken back.

What small writes replaced is also written to a file before the strip is, so that it survives the end of all processes.
What is in the file and not needed any more does no harm: it leads from versions that all strips have to older ones, and
nobody wants those (core.strip_peering).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from sheepdog.cluster.core.ids import STRIP_SHIFT, ObjectId, Version, plain_oid
from sheepdog.cluster.core.limits import UNDO_FILE_BYTES, UNDO_RECORD_BYTES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import NodeState

_CHECKSUM = Struct("<I")  # CRC-32 of the rest
_FIELDS = Struct("<IQIIQIIQQI")  # strip + 1, oid, before, after, offset, length of the old bytes that follow


class Undo(NamedTuple):
    """One write of a strip: the strip was at `before`, is at `after`, and had the bytes `old` at `offset`."""

    before: Version
    after: Version
    offset: int
    old: Buffer  # empty: the write changed only the version


class UndoLog:
    """Of all strips of one node."""

    def __init__(self) -> None:
        self._entries: dict[ObjectId, list[Undo]] = {}
        self._state: NodeState | None = None
        self._written = 0  # bytes in the file

    def load(self, state: NodeState, version_of: Callable[[ObjectId], Version | None]) -> None:
        """What the process before this one has left; `version_of` tells where the strips are now."""
        self._state = state
        data = state.load_undo()
        self._written = len(data)
        self._entries = decode(data)
        for strip, entries in list(self._entries.items()):
            while entries and entries[-1].after != version_of(strip):
                del entries[-1]  # the end came before the strip was written
            if not entries:
                del self._entries[strip]

    def keep(self, strip: ObjectId, undo: Undo) -> None:
        """Before the strip is written."""
        self._entries.setdefault(strip, []).append(undo)
        if self._state is not None and len(undo.old) <= UNDO_RECORD_BYTES:
            if self._written > UNDO_FILE_BYTES:
                self._compact()
            record = encode(strip, undo)
            self._written += len(record)
            self._state.append_undo(record)

    def _compact(self) -> None:
        assert self._state is not None
        needed = b"".join(
            [
                encode(strip, undo)
                for strip, entries in self._entries.items()
                for undo in entries
                if len(undo.old) <= UNDO_RECORD_BYTES
            ]
        )
        self._written = len(needed)
        self._state.replace_undo(needed)

    def earlier(self, strip: ObjectId, version: Version | None) -> list[Version]:
        """The versions that the strip, now at `version`, can go back to, newest first."""
        found = []
        for undo in reversed(self._entries.get(strip, ())):
            if undo.after != version:
                break
            version = undo.before
            found.append(version)
        return found

    def back_to(self, strip: ObjectId, target: Version, version: Version | None) -> list[Undo] | None:
        """What is to be undone, newest first; None when the strip cannot go there."""
        steps = []
        for undo in reversed(self._entries.get(strip, ())):
            if version == target or undo.after != version:
                break
            steps.append(undo)
            version = undo.before
        return steps if version == target else None

    def forget(self, strip: ObjectId, version: Version) -> None:
        """All strips have the writes up to `version`."""
        entries = self._entries.get(strip)
        if entries is None:
            return
        while entries and entries[0].after <= version:
            del entries[0]
        if not entries:
            del self._entries[strip]

    def drop(self, strip: ObjectId) -> None:
        """The strip is new, gone, or agreed upon as it is."""
        self._entries.pop(strip, None)

    def strips(self) -> list[ObjectId]:
        return list(self._entries)

    def clear(self) -> None:
        self._entries.clear()
        if self._state is not None:
            self._compact()


def encode(strip: ObjectId, undo: Undo) -> bytes:
    """One record of the file."""
    body = _FIELDS.pack(
        strip >> STRIP_SHIFT, plain_oid(strip), *undo.before, *undo.after, undo.offset, len(undo.old)
    ) + bytes(undo.old)
    return _CHECKSUM.pack(zlib.crc32(body)) + body


def decode(data: bytes) -> dict[ObjectId, list[Undo]]:
    """The records up to the first that is torn, by strip."""
    found: dict[ObjectId, list[Undo]] = {}
    start = 0
    while start + _CHECKSUM.size + _FIELDS.size <= len(data):
        (checksum,) = _CHECKSUM.unpack_from(data, start)
        start += _CHECKSUM.size
        strip, oid, *versions, offset, length = _FIELDS.unpack_from(data, start)
        end = start + _FIELDS.size + length
        if end > len(data) or zlib.crc32(data[start:end]) != checksum:
            break
        undo = Undo(Version(*versions[:3]), Version(*versions[3:]), offset, data[end - length : end])
        found.setdefault(ObjectId(oid | strip << STRIP_SHIFT), []).append(undo)
        start = end
    return found
