"""The index of hyper volumes: every prefix of its writes leaves all that was known before."""

from __future__ import annotations

import random

import pytest

from sheepdog.cluster.client.btree import Leaf, NodeWrite, Tree
from sheepdog.cluster.core.ids import ObjectId, Vid, inode_oid
from sheepdog.cluster.core.inode import (
    BTREE_COUNTER_OFFSET,
    MAP_OFFSET,
    btree_children,
    btree_leaves,
    btree_used,
    empty_btree,
)
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE

VID = Vid(0x42)
LIMIT = 8


class Objects:
    """What a cluster would hold."""

    def __init__(self) -> None:
        self.inode = bytearray(MAP_OFFSET) + empty_btree() + bytes(1 << 16)
        self.nodes: dict[ObjectId, bytearray] = {}

    def do(self, write: NodeWrite) -> None:
        if write.oid == inode_oid(VID):
            target = self.inode
        elif write.create:
            assert write.oid not in self.nodes
            target = self.nodes[write.oid] = bytearray(1 << 12)
        else:
            target = self.nodes[write.oid]
        target[write.offset : write.offset + len(write.data)] = write.data

    def leaves(self) -> list[Leaf]:
        root = bytes(self.inode[MAP_OFFSET:])
        assert btree_used(root) <= BTREE_NODE_SIZE
        children = btree_children(root)
        if children is None:
            return [self._leaf(ObjectId(0), root)]
        highest = [index for index, _ in children]
        assert highest == sorted(highest)
        return [self._leaf(oid, bytes(self.nodes[oid])) for _, oid in children]

    @staticmethod
    def _leaf(oid: ObjectId, node: bytes) -> Leaf:
        entries = btree_leaves(node)
        assert entries is not None
        assert all(vid == VID for _, vid in entries)
        indexes = [index for index, _ in entries]
        assert indexes == sorted(indexes)
        return Leaf(oid, indexes)

    def tree(self) -> Tree:
        counter = int.from_bytes(self.inode[BTREE_COUNTER_OFFSET : BTREE_COUNTER_OFFSET + 4], "little")
        return Tree(VID, self.leaves(), counter, LIMIT)


@pytest.mark.parametrize("seed", range(20))
def test_an_index_grows_and_survives_its_writer(seed: int) -> None:
    chance = random.Random(seed)
    objects, known = Objects(), dict[int, None]()
    tree = objects.tree()
    for _ in range(60):
        if chance.random() < 0.3:
            start = max(known, default=0)
            fresh = [min(start + 1 + number, (1 << 32) - 1) for number in range(chance.randrange(1, 12))]
        else:
            fresh = [chance.randrange(1 << 32) for _ in range(chance.randrange(1, 20))]
        writes = tree.add(fresh)
        ends = chance.randrange(len(writes) + 1) if chance.random() < 0.3 else len(writes)
        for write in writes[:ends]:
            objects.do(write)
        found = dict.fromkeys(objects.tree())
        assert all(index in found for index in known)
        if ends == len(writes):
            known.update(dict.fromkeys(fresh))
            assert list(found) == sorted(known)
        else:
            tree = objects.tree()  # another writer takes over
            assert not set(found) - set(known) - set(fresh)
            known = found
        assert all(index in tree for index in known)
        assert chance.randrange(1 << 32) not in tree
    assert len(objects.nodes) > 5
