"""An open hyper volume (protocol.md 7.6): up to 16 PB in 2^32 objects, for one thread and one writer at a time."""

from __future__ import annotations

import errno

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.btree import Leaf, NodeWrite, Tree
from sheepdog.cluster.client.connection import PATIENCE_S, Connection
from sheepdog.cluster.client.follow import os_error
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import BTREE_HEADER_SIZE, MAP_OFFSET, btree_children, btree_leaves, btree_used
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.opcodes import Flags


class HyperVolume:
    """Semantics as `blocking.BlockingVolume`. An object is in the index before `write` returns."""

    def __init__(self, connection: Connection, vid: Vid) -> None:
        self._connection = connection
        self._vid = vid
        self.inode = inode = admin.read_header(connection, vid)
        self.size = inode.vdi_size
        self.object_size = inode.object_size
        self._tree = Tree(vid, self._leaves(), inode.btree_counter)

    @classmethod
    def open(cls, address: Address, name: bytes, patience_s: float = PATIENCE_S) -> HyperVolume:
        """SheepError with NO_VDI if there is none."""
        connection = Connection(address, patience_s)
        try:
            return cls(connection, admin.find(connection, name).vid)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def _leaves(self) -> list[Leaf]:
        root = self._node(inode_oid(self._vid), MAP_OFFSET)
        children = btree_children(root)
        if children is None:
            return [Leaf(ObjectId(0), [index for index, _ in btree_leaves(root) or ()])]
        return [Leaf(oid, [index for index, _ in btree_leaves(self._node(oid, 0)) or ()]) for _, oid in children] or [
            Leaf(ObjectId(0), [])
        ]

    def _node(self, oid: ObjectId, offset: int) -> Buffer:
        used = btree_used(admin.read_object(self._connection, oid, offset, BTREE_HEADER_SIZE))
        if used > BTREE_NODE_SIZE:
            raise PeerError(f"B-tree node of {used} bytes")
        return admin.read_object(self._connection, oid, offset, used)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range, clipped to the volume's end."""
        end = min(self.size, offset + length)
        data = bytearray()
        while offset < end:
            index, start = divmod(offset, self.object_size)
            count = min(end - offset, self.object_size - start)
            if index in self._tree:
                data += admin.read_object(self._connection, data_oid(self._vid, index), start, count)
            else:
                data += bytes(count)
            offset += count
        return bytes(data)

    def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        """Writes a range; ENOSPC (and nothing written) if it ends beyond the volume."""
        view = memoryview(data)
        if offset + len(view) > self.size:
            raise os_error(errno.ENOSPC)
        flags = Flags.DIRECT if durable else Flags.CACHE
        made: list[int] = []
        while view:
            index, start = divmod(offset, self.object_size)
            part = view[: self.object_size - start]
            oid = data_oid(self._vid, index)
            if index in self._tree:
                admin.write_object(self._connection, oid, start, part, flags)
            else:
                admin.create_object(self._connection, oid, start, part)
                made.append(index)
            offset, view = offset + len(part), view[len(part) :]
        for write in self._tree.add(made):
            self._write_node(write)

    def _write_node(self, write: NodeWrite) -> None:
        if write.create:
            admin.create_object(self._connection, write.oid, write.offset, write.data)
        else:
            admin.write_object(self._connection, write.oid, write.offset, write.data)

    def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """The range reads as zeros afterwards; what is not allocated stays so."""
        end = min(self.size, offset + length)
        while offset < end:
            index, start = divmod(offset, self.object_size)
            count = min(end - offset, self.object_size - start)
            if index in self._tree:
                self.write(offset, bytes(count), durable)
            offset += count
