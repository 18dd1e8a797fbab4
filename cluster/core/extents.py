"""What the cache holds of one object: sets of 4 KiB blocks as integers, bit i for block i."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_GROUP_BLOCKS
from sheepdog.cluster.core.messages import Buffer

if TYPE_CHECKING:
    from sheepdog.cluster.core.cached_volume import CachedVolume

IoDone: TypeAlias = Callable[[int, Buffer], None]
Held: TypeAlias = tuple[Callable[[], None], IoDone]
"""A request that waits: what begins it anew, and who is told if that never comes."""

MARKS_BYTES = BLOCK_SIZE  # behind the data of each object: one bit for each group that may be dirty
_GROUP = (1 << CACHE_GROUP_BLOCKS) - 1


def span(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def touched(offset: int, length: int) -> int:
    """The blocks that a range has bytes of."""
    first = offset // BLOCK_SIZE
    return ((1 << (offset + length - 1) // BLOCK_SIZE + 1 - first) - 1) << first


def covered(offset: int, length: int) -> int:
    """The blocks that a range has all bytes of."""
    first, end = -(-offset // BLOCK_SIZE), (offset + length) // BLOCK_SIZE
    return span(first, end - first) if end > first else 0


def runs(bits: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks in a set that are neighbours, ascending."""
    first = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        first += skip
        count = (~bits & (bits + 1)).bit_length() - 1
        yield first, count
        bits >>= count
        first += count


def groups_of(bits: int) -> int:
    """The groups that have a block in the set."""
    groups = 0
    for first, count in runs(bits):
        low = first // CACHE_GROUP_BLOCKS
        groups |= span(low, (first + count - 1) // CACHE_GROUP_BLOCKS + 1 - low)
    return groups


def blocks_of(groups: int) -> int:
    """All blocks of the groups."""
    bits = 0
    for first, count in runs(groups):
        bits |= span(first * CACHE_GROUP_BLOCKS, count * CACHE_GROUP_BLOCKS)
    return bits


class Fill:
    """Blocks that are on their way from the cluster; a change takes out those that it concerns."""

    __slots__ = ("arrived", "bits")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.arrived = False  # they are about to be kept


class CachedObject:
    """One object. `present`: its block here is the newest; `dirty`: and the cluster's is not; `pushing`: on its way
    there; `writing`: on its way to the disk here, so that others have to wait; `marked`: groups that a restart takes
    for dirty, as far as they are present.
    """

    __slots__ = (
        "barred",
        "blocked",
        "dirty",
        "fills",
        "known",
        "marked",
        "oid",
        "present",
        "pushing",
        "read_ahead",
        "read_end",
        "size",
        "stored",
        "through",
        "users",
        "volume",
        "when_idle",
        "writing",
    )

    def __init__(self, volume: CachedVolume, oid: ObjectId, size: int) -> None:
        self.volume = volume
        self.oid = oid
        self.size = size
        self.present = self.dirty = self.pushing = self.writing = self.marked = 0
        self.known = False  # the cluster has the object: what is written to it can be pushed
        self.stored = False  # there is a file for it here
        self.users = 0  # requests that are using the file, or will
        self.through = 0  # changes that go past the cache: what is fetched meanwhile may be older
        self.fills: list[Fill] = []
        self.barred = False  # one request has it alone, as soon as nobody uses it
        self.when_idle: Callable[[], None] | None = None
        self.blocked: list[Held] = []
        self.read_end = -1  # where the last read ended: the next one there is sequential
        self.read_ahead = 0  # bytes of the present window

    @property
    def idle(self) -> bool:
        return not (self.users or self.pushing or self.through or self.fills)

    def change(self, bits: int) -> None:
        """These blocks get other bytes: what is on its way from the cluster is older."""
        for fill in self.fills:
            fill.bits &= ~bits

    def forget(self) -> None:
        """Nothing of it is here."""
        self.present = self.dirty = self.marked = 0
        self.stored = False

    def blocks(self) -> int:
        """Blocks that its file takes here, those of marks and trailer included."""
        return self.present.bit_count() + overhead(self.size) if self.stored else 0


def overhead(size: int) -> int:
    """Blocks of marks and trailer of a file: 8 bytes a block and a header."""
    return 2 + -(-(size // BLOCK_SIZE + 1) * 8 // BLOCK_SIZE)
