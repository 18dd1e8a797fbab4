"""The index of a hyper volume (protocol.md 7.6): which objects exist, and the writes that make a new one known.

Without I/O. A tree is one leaf in the inode until that is full; then leaves are objects of their own, named by the
inode. Every object that the index names exists before it is named, and what is named stays so if a writer ends
between two writes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import pairwise
from struct import Struct
from typing import NamedTuple

from sheepdog.cluster.core.ids import ObjectId, Vid, btree_oid, inode_oid
from sheepdog.cluster.core.inode import (
    BTREE_COUNTER_OFFSET,
    BTREE_HEADER_SIZE,
    BTREE_MAGIC,
    INNER_DEPTH,
    LEAF_DEPTH,
    MAP_OFFSET,
)
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE

LEAF_ENTRIES = (BTREE_NODE_SIZE - BTREE_HEADER_SIZE) // 8
_HEAD = Struct("<HHI")
_LEAF = Struct("<II")
_INNER = Struct("<I4xQ")


class NodeWrite(NamedTuple):
    """One request: `create` makes a new object."""

    oid: ObjectId
    offset: int
    data: bytes
    create: bool = False


class Leaf:
    """Entries of one leaf; `oid` 0 is the inode itself."""

    __slots__ = ("indexes", "moved", "oid", "written")

    def __init__(self, oid: ObjectId, indexes: list[int]) -> None:
        self.oid = oid
        self.indexes = indexes  # ascending
        self.written = len(indexes)  # entries that are there already
        self.moved = False  # some of them are at another place now

    def add(self, index: int) -> bool:
        """False if it is there."""
        place = bisect_left(self.indexes, index)
        if place < len(self.indexes) and self.indexes[place] == index:
            return False
        self.moved = self.moved or place < self.written
        self.indexes.insert(place, index)
        return True


class Tree:
    """The index of the volume `vid`, all of whose objects are its own (there are no snapshots of hyper volumes)."""

    def __init__(self, vid: Vid, leaves: list[Leaf], counter: int, limit: int = LEAF_ENTRIES) -> None:
        """`limit`: entries of a leaf, less than a node holds in tests only."""
        self._vid = vid
        self._leaves = leaves
        self._counter = counter
        self._limit = limit
        for leaf, after in pairwise(leaves):  # a split that was interrupted leaves the same entries in both
            while leaf.indexes and after.indexes and leaf.indexes[-1] >= after.indexes[0]:
                leaf.indexes.pop()
                leaf.moved = True

    def __contains__(self, index: int) -> bool:
        indexes = self._leaf_of(index).indexes
        place = bisect_left(indexes, index)
        return place < len(indexes) and indexes[place] == index

    def __iter__(self) -> Iterator[int]:
        for leaf in self._leaves:
            yield from leaf.indexes

    def __len__(self) -> int:
        return sum(len(leaf.indexes) for leaf in self._leaves)

    def between(self, first: int, end: int) -> Iterator[int]:
        """The indexes from `first` to before `end`, ascending."""
        for leaf in self._leaves:
            if leaf.indexes and leaf.indexes[-1] >= first:
                yield from leaf.indexes[bisect_left(leaf.indexes, first) : bisect_left(leaf.indexes, end)]
                if leaf.indexes[-1] >= end:
                    return

    def _leaf_of(self, index: int) -> Leaf:
        place = bisect_left(self._leaves, index, key=lambda leaf: leaf.indexes[-1] if leaf.indexes else -1)
        return self._leaves[min(place, len(self._leaves) - 1)]

    def add(self, indexes: Iterable[int]) -> list[NodeWrite]:
        """Objects that exist now; the writes that tell, to be done one after the other."""
        changed: dict[ObjectId, Leaf] = {}
        for index in indexes:
            leaf = self._leaf_of(index)
            if leaf.add(index):
                changed[leaf.oid] = leaf
        if not changed:
            return []
        full = [leaf for leaf in changed.values() if len(leaf.indexes) > self._limit]
        if full:
            return self._split(changed)
        writes = [write for leaf in changed.values() for write in self._tell(leaf)]
        return writes if not self._leaves[0].oid else [*writes, self._root()]  # a highest index may be another

    def _tell(self, leaf: Leaf) -> list[NodeWrite]:
        """What was appended becomes valid with the count, so it comes first; what was moved needs one write."""
        oid, start = (leaf.oid, 0) if leaf.oid else (inode_oid(self._vid), MAP_OFFSET)
        written, moved = leaf.written, leaf.moved
        leaf.written, leaf.moved = len(leaf.indexes), False
        head = _HEAD.pack(BTREE_MAGIC, LEAF_DEPTH, len(leaf.indexes))
        if moved:
            return [NodeWrite(oid, start, head + self._entries(leaf.indexes))]
        tail = self._entries(leaf.indexes[written:])
        return [NodeWrite(oid, start + BTREE_HEADER_SIZE + written * _LEAF.size, tail), NodeWrite(oid, start, head)]

    def _entries(self, indexes: list[int]) -> bytes:
        return b"".join([_LEAF.pack(index, self._vid) for index in indexes])

    def _root(self) -> NodeWrite:
        inner = b"".join([_INNER.pack(leaf.indexes[-1], leaf.oid) for leaf in self._leaves])
        head = _HEAD.pack(BTREE_MAGIC, INNER_DEPTH, len(self._leaves))
        return NodeWrite(inode_oid(self._vid), MAP_OFFSET, head + inner)

    def _split(self, changed: dict[ObjectId, Leaf]) -> list[NodeWrite]:
        """The upper parts of full leaves become new objects; when the root names those, the old ones shrink."""
        made: list[NodeWrite] = []
        shrunk: list[Leaf] = []
        leaves: list[Leaf] = []
        half = max(self._limit // 2, 1)
        for leaf in self._leaves:
            if len(leaf.indexes) <= self._limit:
                leaves.append(leaf)
                if leaf.oid in changed:
                    made += self._tell(leaf)
                continue
            indexes = leaf.indexes
            if leaf.oid:
                leaf.indexes, leaf.moved = indexes[:half], True
                shrunk.append(leaf)
                leaves.append(leaf)
            for start in range(half if leaf.oid else 0, len(indexes), half):
                self._counter += 1
                part = Leaf(btree_oid(self._vid, self._counter), indexes[start : start + half])
                head = _HEAD.pack(BTREE_MAGIC, LEAF_DEPTH, len(part.indexes))
                made.append(NodeWrite(part.oid, 0, head + self._entries(part.indexes), create=True))
                leaves.append(part)
        self._leaves = leaves
        counter = NodeWrite(inode_oid(self._vid), BTREE_COUNTER_OFFSET, self._counter.to_bytes(4, "little"))
        return [counter, *made, self._root(), *(write for leaf in shrunk for write in self._tell(leaf))]
