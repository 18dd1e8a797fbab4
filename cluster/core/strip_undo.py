"""How the strips of this node can go back to where they were before writes that may not be everywhere.

A write of an erasure-coded object changes several strips. If nodes die while it is on its way, some strips have it and
others have not, and nothing can be decoded from strips of different versions. So each strip keeps the bytes that a
write replaced until the home says that all strips have it (the watermark); until then it can be taken back.

A write changes few of the strips, and only those get its version. So each strip also remembers which strips its writes
have touched, until the home has brought all strips of the object level (core.strip_levels): with that peering can tell
a strip that lacks a write from one that the write left alone.

What small writes replaced is also written to a file before the strip is, so that it survives the end of all processes
and, as far as the writes do, the loss of power.
What is in the file and not needed any more does no harm: it leads from versions that all strips have to older ones, and
nobody wants those (core.strip_peering).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Final, NamedTuple

from librt.strings import BytesWriter
from xxhash import xxh3_64_intdigest

from sheepdog.cluster.core.ids import STRIP_SHIFT, ObjectId, Version, plain_oid
from sheepdog.cluster.core.limits import UNDO_FILE_BYTES, UNDO_RECORD_BYTES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import NodeState
from sheepdog.cluster.core.words import write_u32, write_u64

_SEAL = Struct("<I")  # of the rest, see `_is_sealed`
_SEAL_MASK: Final = 0xFFFFFFFF
_FIELDS = Struct("<IQIIQIIQIQI")  # strip + 1, oid, before, after, touched, offset, length of the old bytes that follow
_GONE: Final = 0xFFFFFFFF  # as a length: no way back
ALL_STRIPS: Final = (1 << 31) - 1  # touched: as many as a policy may have
NO_STRIPS: Final = 0  # touched: the strip was brought level, no write came


class Undo:
    """One write of a strip: the strip was at `before`, is at `after`, and had the bytes `old` at `offset`."""

    __slots__ = ("after", "before", "offset", "old", "touched")

    def __init__(
        self, before: Version, after: Version, offset: int, old: Buffer | None, touched: int = ALL_STRIPS
    ) -> None:
        self.before = before
        self.after = after
        self.offset = offset
        self.old = old  # empty: the write changed only the version; None: nobody may go back behind it any more
        self.touched = touched  # the strips that the write changes, a bit each


class Step(NamedTuple):
    """What is known of a strip's way to a version: from `before`, by a write that touched these strips."""

    before: Version
    touched: int
    back: bool  # it can be gone back


class _Chain:
    """The steps of one strip, the oldest first; the first `settled` of them cannot be gone back."""

    __slots__ = ("settled", "steps")

    def __init__(self) -> None:
        self.steps: list[Undo] = []
        self.settled = 0


class UndoLog:
    """Of all strips of one node."""

    def __init__(self) -> None:
        self._chains: dict[ObjectId, _Chain] = {}
        self._state: NodeState | None = None
        self._written = 0  # bytes in the file
        self._compact_at = UNDO_FILE_BYTES  # so many

    def load(self, state: NodeState, version_of: Callable[[ObjectId], Version | None]) -> None:
        """What the process before this one has left; `version_of` tells where the strips are now."""
        self._state = state
        parts = state.load_undo()
        found: dict[ObjectId, list[Undo]] = {}
        for data in parts:
            for strip, records in decode(data).items():
                found.setdefault(strip, []).extend(records)
        for strip, records in found.items():
            steps: list[Undo] = []
            for undo in records:
                _append(steps, undo)
            while steps and steps[-1].after != version_of(strip):
                del steps[-1]  # the end came before the strip was written
            if steps:
                self._chains[strip] = chain = _Chain()
                chain.steps = steps
        if any(parts):
            self._compact()  # nothing that is appended behind a torn end would be found

    def keep(self, strip: ObjectId, undo: Undo) -> None:
        """Before the strip is written."""
        chain = self._chains.get(strip)
        if chain is None:
            chain = self._chains[strip] = _Chain()
        _append(chain.steps, undo)
        if self._state is not None:
            if self._written > self._compact_at:
                self._compact()
            record = encode(strip, undo)
            self._written += len(record)
            self._state.append_undo(record)

    def _compact(self) -> None:
        assert self._state is not None
        needed = b"".join([encode(strip, undo) for strip, chain in self._chains.items() for undo in chain.steps])
        self._written = len(needed)
        self._compact_at = max(UNDO_FILE_BYTES, 2 * len(needed))  # where all is needed, not with each write
        self._state.replace_undo(needed)

    def steps(self, strip: ObjectId, version: Version | None) -> list[Step]:
        """How the strip, now at `version`, came there, the last step first."""
        found: list[Step] = []
        chain, back = self._chains.get(strip), True
        for undo in reversed(chain.steps if chain is not None else ()):
            if undo.after != version:
                break
            version, back = undo.before, back and undo.old is not None
            found.append(Step(version, undo.touched, back))
        return found

    def back_to(self, strip: ObjectId, target: Version, version: Version | None) -> list[Undo] | None:
        """What is to be undone, newest first; None when the strip cannot go there."""
        steps: list[Undo] = []
        chain = self._chains.get(strip)
        for undo in reversed(chain.steps if chain is not None else ()):
            if version == target or undo.after != version or undo.old is None:
                break
            steps.append(undo)
            version = undo.before
        return steps if version == target else None

    def before(self, strip: ObjectId, cut: Version, version: Version) -> Version:
        """What the strip, now at `version`, was before the write `cut` and all behind it, as far as that is known."""
        for step in self.steps(strip, version):
            if version < cut:
                break
            version = step.before
        return version

    def went_back(self, strip: ObjectId, version: Version) -> None:
        """The strip is at `version` again, or still: what leads on from there did not happen."""
        chain = self._chains.get(strip)
        if chain is not None:
            _cut(chain.steps, version)
            chain.settled = min(chain.settled, len(chain.steps))
            if not chain.steps:
                del self._chains[strip]

    def replaced(self, strip: ObjectId, version: Version) -> Buffer | None:
        """The bytes that the write `version` replaced; None if that is not known any more."""
        chain = self._chains.get(strip)
        for undo in reversed(chain.steps if chain is not None else ()):
            if undo.after == version:
                return undo.old
        return None

    def settle(self, strip: ObjectId, version: Version) -> None:
        """All strips that they touch have the writes up to `version`: nobody takes those back."""
        chain = self._chains.get(strip)
        if chain is None:
            return
        steps, settled = chain.steps, min(chain.settled, len(chain.steps))
        level: Version | None = None
        while settled < len(steps) and (undo := steps[settled]).after <= version:
            undo.old = None
            settled += 1
            if touches_all(undo.touched):
                level = undo.after
        chain.settled = settled
        if level is not None:
            self.level(strip, level)

    def level(self, strip: ObjectId, version: Version) -> None:
        """All strips of the object were brought to `version`: what led there does not matter any more.

        Unless the strip went back behind it since: so did the others, each to a version of its own.
        """
        chain = self._chains.get(strip)
        if chain is None or all(undo.after != version for undo in chain.steps):
            return
        count = 0
        while count < len(chain.steps) and chain.steps[count].after <= version:
            count += 1
        del chain.steps[:count]
        chain.settled = max(0, chain.settled - count)
        if not chain.steps:
            del self._chains[strip]

    def drop(self, strip: ObjectId) -> None:
        """The strip is new, gone, or agreed upon as it is."""
        self._chains.pop(strip, None)

    def every_step(self) -> Iterator[tuple[ObjectId, Undo]]:
        """Of each strip the oldest first."""
        for strip, chain in self._chains.items():
            for undo in chain.steps:
                yield strip, undo

    def strips(self) -> list[ObjectId]:
        return list(self._chains)

    def clear(self) -> None:
        self._chains.clear()
        if self._state is not None:
            self._compact()


def _append(steps: list[Undo], undo: Undo) -> None:
    """What does not lead to where this step begins was gone back, or never came."""
    _cut(steps, undo.before)
    steps.append(undo)


def _cut(steps: list[Undo], version: Version) -> None:
    """What leads to `version` is left."""
    while steps and steps[-1].after != version:
        del steps[-1]


def touches_all(touched: int) -> bool:
    """The write changed all strips of its object: every write changes the parity, so there is no gap before that."""
    return bool(touched & 1) and not touched & touched + 1


def encode(strip: ObjectId, undo: Undo) -> bytes:
    """One record of the file. What a large write replaced is left out: there is no way back then."""
    old = undo.old
    if old is None or len(old) > UNDO_RECORD_BYTES:
        old, length = b"", _GONE
    else:
        length = len(old)
    fields = BytesWriter()
    write_u32(fields, strip >> STRIP_SHIFT)
    write_u64(fields, plain_oid(strip))
    for epoch, term, counter in (undo.before, undo.after):
        write_u32(fields, epoch)
        write_u32(fields, term)
        write_u64(fields, counter)
    write_u32(fields, undo.touched)
    write_u64(fields, undo.offset)
    write_u32(fields, length)
    body = fields.getvalue() + old
    return (xxh3_64_intdigest(body) & _SEAL_MASK).to_bytes(4, "little") + body


def _is_sealed(body: bytes, seal: int) -> bool:
    """The lower half of its XXH3; before format 3 of the file it was the CRC-32, which took ten times as long."""
    return seal in (xxh3_64_intdigest(body) & _SEAL_MASK, zlib.crc32(body))


def decode(data: bytes) -> dict[ObjectId, list[Undo]]:
    """The records up to the first that is torn, by strip."""
    found: dict[ObjectId, list[Undo]] = {}
    start = 0
    while start + _SEAL.size + _FIELDS.size <= len(data):
        (seal,) = _SEAL.unpack_from(data, start)
        start += _SEAL.size
        strip, oid, *versions, touched, offset, length = _FIELDS.unpack_from(data, start)
        old = start + _FIELDS.size
        end = old + (0 if length == _GONE else length)
        if end > len(data) or not _is_sealed(data[start:end], seal):
            break
        bytes_ = None if length == _GONE else data[old:end]
        undo = Undo(Version(*versions[:3]), Version(*versions[3:]), offset, bytes_, touched)
        found.setdefault(ObjectId(oid | strip << STRIP_SHIFT), []).append(undo)
        start = end
    return found
