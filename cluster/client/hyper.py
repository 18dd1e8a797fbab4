"""An open hyper volume (protocol.md 7.6): up to 16 PB in 2^32 objects, for any number of threads and one such writer.

Reads, and writes to objects that exist, share one pipelined connection; objects are made one at a time, since each is
told to the index before its write returns.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.blocking import EXTENT_OBJECTS, BlockingVolume
from sheepdog.cluster.client.btree import Leaf, NodeWrite, Tree
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import ANSWER_LIMIT_S, PATIENCE_S, Connection, Dial
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import os_error
from sheepdog.cluster.client.machine import Extent
from sheepdog.cluster.client.requests import flush_header, read_header, write_header, zero_header
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import BTREE_HEADER_SIZE, MAP_OFFSET, btree_children, btree_leaves, btree_used
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.opcodes import Flags

MAX_OBJECTS = 1 << 32  # indexes of the tree have 32 bits


class HyperVolume:
    """Semantics as `blocking.BlockingVolume`. An object is in the index before `write` returns, and stays there:
    what is discarded becomes holes in the objects."""

    def __init__(
        self, connection: Connection, vid: Vid, read_only: bool, patience_s: float, dial: Dial | None = None
    ) -> None:
        self._connection = connection
        self._vid = vid
        self.read_only = read_only
        self.inode = inodes.read_header(connection, vid)
        self.object_size = self.inode.object_size
        self._making = threading.Lock()  # around the connection: one object is made at a time
        self._table = threading.Lock()  # around every look at the tree; never held during I/O
        self._tree = self._read_tree()
        self._telling: int | None = None  # the object that the cluster's index does not name yet
        self._unsure = False  # how much of a change of the index was written
        self._channel = Channel(connection.address, patience_s, dial)

    @classmethod
    def open(
        cls,
        address: Address,
        name: bytes,
        read_only: bool = False,
        patience_s: float = PATIENCE_S,
        dial: Dial | None = None,
    ) -> HyperVolume:
        """SheepError with NO_VDI if there is none."""
        connection = Connection(address, patience_s, dial=dial, answer_limit_s=ANSWER_LIMIT_S)
        try:
            return cls(connection, admin.find(connection, name).vid, read_only, patience_s, dial)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Ends in order: what was written is durable."""
        try:
            self.flush()
        finally:
            self._channel.close()
            with suppress(OSError):
                self._connection.close()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.inode.vdi_size

    def allocated_bytes(self) -> int:
        """How much is backed by objects."""
        with self._table:
            return len(self._tree) * self.object_size

    # -- bytes

    def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range, clipped to the volume's end."""
        data = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from `offset` on; returns how many bytes there were before the volume's end."""
        length = max(0, min(len(buffer), self.size - offset))
        done = 0
        for index, start, count in self._pieces(offset, length):
            part = buffer[done : done + count]
            if not self._has(index):
                part[:] = bytes(count)
            else:
                result, got = self._channel.ask(read_header(data_oid(self._vid, index), start, count), b"", part)
                if result or got != count:
                    raise SheepError(result or Result.EIO)
            done += count
        return length

    def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        """Writes a range; ENOSPC (and nothing written) if it ends beyond the volume, EROFS if that is read-only."""
        view = memoryview(data)
        self._may_write(offset, len(view))
        for index, start, count in self._pieces(offset, len(view)):
            part, view = view[:count], view[count:]
            if self._has(index) or not self._create(index, start, part):
                self._ask(write_header(data_oid(self._vid, index), start, count, durable), part)

    def flush(self) -> None:
        """Everything written and returned before, by any thread, is durable when this returns."""
        if self.read_only:
            return
        result, _ = self._channel.ask(flush_header(self._vid))
        if result not in (Result.SUCCESS, Result.INVALID_PARMS):  # the latter: no node has a cache
            raise SheepError(result)

    def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """The range reads as zeros afterwards; what is not allocated stays so."""
        self._may_write(offset, 0)
        for index, start, count in self._pieces_there(offset, length):
            oid = data_oid(self._vid, index)
            if self.inode.copy_policy:
                self._ask(write_header(oid, start, count, durable), bytes(count))
            else:
                self._ask(zero_header(oid, start, count, durable))

    def zero_is_fast(self, offset: int, length: int) -> bool:
        """`zero` of the range would send no data."""
        return not self.inode.copy_policy or not self._pieces_there(offset, length)

    def trim(self, offset: int, length: int) -> None:
        """What lies in the range becomes holes, where that is cheap."""
        if not self.inode.copy_policy:
            self.zero(offset, length)

    # -- shape

    def resize(self, size: int) -> None:
        """Grows the volume; EINVAL for less than its size, EFBIG for more than its index can name."""
        if size < self.size:
            raise os_error(errno.EINVAL)
        if size > MAX_OBJECTS * self.object_size:
            raise os_error(errno.EFBIG)
        with self._making:
            changed = replace(inodes.read_header(self._connection, self._vid), vdi_size=size)
            admin.write_object(self._connection, inode_oid(self._vid), 0, changed.pack())
            self.inode = changed

    def refresh(self) -> None:
        """Learns what others have done: the size, and if the volume is read-only which objects there are."""
        with self._making:
            self.inode = inodes.read_header(self._connection, self._vid)
            if self.read_only:
                self._replace_tree()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range (clipped to the volume), by whole objects."""
        size, end = self.object_size, min(offset + length, self.size)
        with self._table:
            indexes = list(self._tree.between(offset // size, -(-end // size)))
        for index in indexes:
            start, stop = max(index * size, offset), min((index + 1) * size, end)
            if start > offset:
                yield Extent(offset, start - offset, False)
            yield Extent(start, stop - start, True)
            offset = stop
        if offset < end:
            yield Extent(offset, end - offset, False)

    def block_extents(self, offset: int, length: int, objects: int = EXTENT_OBJECTS) -> list[Extent]:
        """`extents`; only the range's beginning, if more than `objects` exist in it."""
        return list(islice(self.extents(offset, length), 2 * objects))

    # -- objects

    def _may_write(self, offset: int, length: int) -> None:
        if self.read_only:
            raise os_error(errno.EROFS)
        if offset + length > self.size:
            raise os_error(errno.ENOSPC)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(object, offset in it, length) of a range."""
        end = offset + length
        while offset < end:
            index, start = divmod(offset, self.object_size)
            count = min(end - offset, self.object_size - start)
            yield index, start, count
            offset += count

    def _pieces_there(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        self._make_sure()
        size = self.object_size
        return [
            (extent.offset // size, extent.offset % size, extent.length)
            for extent in self.extents(offset, length)
            if extent.allocated
        ]

    def _has(self, index: int) -> bool:
        """Whether the object exists, and the index names it: only then may a write to it be acknowledged."""
        self._make_sure()
        with self._table:
            return index != self._telling and index in self._tree

    def _ask(self, header: bytearray, payload: Buffer = b"") -> None:
        result, _ = self._channel.ask(header, payload)
        if result:
            raise SheepError(result)

    def _create(self, index: int, start: int, data: Buffer) -> bool:
        """False if another thread was quicker."""
        with self._making:
            with self._table:
                if index in self._tree:
                    return False
            admin.create_object(self._connection, data_oid(self._vid, index), start, data)
            with self._table:
                self._telling = index
                writes = self._tree.add([index])
            try:
                self._write_nodes(writes)
            except BaseException:
                self._unsure = True
                raise
            finally:
                self._telling = None
            return True

    # -- the index

    def _make_sure(self) -> None:
        if self._unsure:
            with self._making:
                self.inode = inodes.read_header(self._connection, self._vid)
                self._replace_tree()

    def _replace_tree(self) -> None:
        tree = self._read_tree()
        with self._table:
            self._tree = tree
        self._unsure = False

    def _read_tree(self) -> Tree:
        return Tree(self._vid, self._read_leaves(), self.inode.btree_counter)

    def _write_nodes(self, writes: list[NodeWrite]) -> None:
        for write in writes:
            if write.create:
                admin.create_object(self._connection, write.oid, write.offset, write.data)
            else:
                admin.write_object(self._connection, write.oid, write.offset, write.data, Flags.DIRECT)

    def _read_leaves(self) -> list[Leaf]:
        root = self._read_node(inode_oid(self._vid), MAP_OFFSET)
        children = btree_children(root)
        if children is None:
            return [Leaf(ObjectId(0), [index for index, _ in btree_leaves(root) or ()])]
        leaves = [Leaf(oid, [index for index, _ in btree_leaves(self._read_node(oid, 0)) or ()]) for _, oid in children]
        return leaves or [Leaf(ObjectId(0), [])]

    def _read_node(self, oid: ObjectId, offset: int) -> Buffer:
        used = btree_used(admin.read_object(self._connection, oid, offset, BTREE_HEADER_SIZE))
        if used > BTREE_NODE_SIZE:
            raise PeerError(f"B-tree node of {used} bytes")
        return admin.read_object(self._connection, oid, offset, used)


def open_volume(
    address: Address,
    name: bytes,
    tag: bytes = b"",
    snap_id: int = 0,
    read_only: bool = False,
    patience_s: float = PATIENCE_S,
    dial: Dial | None = None,
) -> BlockingVolume | HyperVolume:
    """`BlockingVolume.open`, whichever kind of volume it is."""
    try:
        return BlockingVolume.open(address, name, tag, snap_id, read_only, patience_s, dial=dial)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    return HyperVolume.open(address, name, read_only, patience_s, dial)
