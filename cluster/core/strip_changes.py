"""Which blocks of the strips here changed since versions that they had before: a strip that comes back old is made from
the others only where something changed.

A version stands for all writes of the object up to it, so strips that were at the same version were one state then,
whatever became of later writes. Where a block of a strip and the same block of D others have not changed since, it is
still what these tell. So it counts as a change, too, when a write is taken back; and nobody need know which
versions all strips had: any that the strips have in common will do.

In memory only, but for what the undo file still has (core.strip_undo): who does not know is asked for everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE, CHANGED_STRIPS, CHANGES_KEPT
from sheepdog.cluster.core.messages import Buffer

ALL_BLOCKS: Final = -1  # as a set of blocks, a bit each
_COUNT = Struct("<I")
_VERSION = Struct("<IIQ")


class _History:
    """The strip was at `bases[i]`, and then `blocks[i]` changed until it was at the next one, at last at `now`."""

    __slots__ = ("bases", "blocks", "now")

    def __init__(self, base: Version) -> None:
        self.bases = [base]
        self.blocks = [0]
        self.now = base


class StripChanges:
    """Of the strips of one node."""

    def __init__(self) -> None:
        self._known: dict[ObjectId, _History] = {}
        self._distrusted: dict[ObjectId, None] = {}

    def note(self, strip: ObjectId, before: Version, after: Version, offset: int, length: int) -> None:
        """The strip goes from one version to another, and these bytes change; length -1: nobody knows which do."""
        history = self._at(strip, before)
        if length:
            blocks = ALL_BLOCKS
            if length > 0:
                first = offset // BLOCK_SIZE
                blocks = (1 << (offset + length - 1) // BLOCK_SIZE - first + 1) - 1 << first
            history.blocks[-1] |= blocks
        history.now = after

    def mark(self, strip: ObjectId, version: Version, keep: int = CHANGES_KEPT) -> None:
        """All strips of the object come to this version: one that goes away now will have it."""
        history = self._at(strip, version)
        if history.bases[-1] != version:
            history.bases.append(version)
            history.blocks.append(0)
            del history.bases[:-keep], history.blocks[:-keep]

    def _at(self, strip: ObjectId, version: Version) -> _History:
        history = self._known.get(strip)
        if history is None or history.now != version:
            if len(self._known) >= CHANGED_STRIPS:
                del self._known[next(iter(self._known))]
            history = self._known[strip] = _History(version)
        return history

    def since(self, strip: ObjectId, version: Version) -> dict[Version, int]:
        """The blocks that changed on ways to `version`, where the strip is, by where they begin; the shortest first.

        Empty if the strip is not to be trusted.
        """
        if strip in self._distrusted:
            return {}
        found = {version: 0}
        history = self._known.get(strip)
        if history is not None and history.now == version:
            blocks = 0
            for base, changed in zip(reversed(history.bases), reversed(history.blocks), strict=True):
                blocks |= changed
                found[base] = blocks
        return found

    def drop(self, strip: ObjectId) -> None:
        """The strip is gone, or another one now."""
        self._known.pop(strip, None)

    def distrust(self, strip: ObjectId) -> None:
        """The strip may not be what its version says, until it is made anew."""
        self._distrusted[strip] = None

    def trust(self, strip: ObjectId) -> None:
        self._distrusted.pop(strip, None)

    def clear(self) -> None:
        self._known.clear()
        self._distrusted.clear()


def in_common(ways: Sequence[Mapping[Version, int]]) -> int:
    """The blocks that changed on any of the strips since the latest version that all of them had."""
    first, *others = ways
    for version, blocks in first.items():
        if all(version in other for other in others):
            for other in others:
                blocks |= other[version]
            return blocks
    return ALL_BLOCKS


def encode_changes(changes: Mapping[Version, int], blocks: int) -> bytes:
    """Of a strip of so many blocks: how many versions, then each with a bit for each block."""
    size = -(-blocks // 8)
    every = (1 << 8 * size) - 1
    parts = [_COUNT.pack(len(changes))]
    for version, changed in changes.items():
        parts += _VERSION.pack(*version), (changed & every).to_bytes(size, "little")
    return b"".join(parts)


def decode_changes(data: Buffer, blocks: int) -> tuple[dict[Version, int], int]:
    """What `encode_changes` was given, and how many bytes it takes; PeerError."""
    size = -(-blocks // 8)
    if len(data) < _COUNT.size:
        raise PeerError("list of changed blocks without a length")
    (count,) = _COUNT.unpack_from(data)
    end = _COUNT.size + count * (_VERSION.size + size)
    if end > len(data):
        raise PeerError("list of changed blocks cut short")
    found = {}
    for at in range(_COUNT.size, end, _VERSION.size + size):
        start = at + _VERSION.size
        found[Version(*_VERSION.unpack_from(data, at))] = int.from_bytes(data[start : start + size], "little")
    return found, end
