"""The inode object of a VDI: header, object map and the B-tree of hyper volumes (protocol.md 6.2, 7).

Clients own most of these bytes: QEMU, tgt and dog write headers and map entries straight into the object.
So nothing read here is trusted: what cannot be an inode is a PeerError.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from struct import Struct
from typing import Final

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import (
    VID_COUNT,
    ObjectId,
    is_attribute,
    is_btree,
    is_data,
    is_inode,
    is_vmstate,
)
from sheepdog.cluster.core.limits import (
    ATTRIBUTE_SIZE,
    BTREE_NODE_SIZE,
    INODE_SIZE,
    LEDGER_SIZE,
    MAX_MAP_ENTRIES,
    MAX_SHIFT,
    MIN_SHIFT,
)
from sheepdog.cluster.core.strings import padded, until_nul

Bytes = bytes | bytearray | memoryview

HEADER_SIZE: Final = 4664
SNAP_CTIME_OFFSET: Final = 520  # in the header, 8 bytes: 0 until the VDI is frozen
MAP_OFFSET: Final = HEADER_SIZE
MAP_ENTRY_SIZE: Final = 4
MAP_END: Final = MAP_OFFSET + MAP_ENTRY_SIZE * MAX_MAP_ENTRIES  # what QEMU and tgt read at open; references follow
TAG_OFFSET: Final = 256  # dog writes the tag alone before it takes a snapshot
TAG_SIZE: Final = 256
BTREE_COUNTER_OFFSET: Final = 568

_HEADER: Final = Struct("<256s256sQQQQQBBBBIIII4092x")


@dataclass(slots=True)
class InodeHeader:
    """The first 4664 bytes. Times are seconds << 32 | nanoseconds, sizes are bytes, ids are vids."""

    name: bytes = b""  # empty: deleted
    tag: bytes = b""
    create_time: int = 0
    snap_ctime: int = 0  # 0: working VDI, else snapshot
    vm_clock_nsec: int = 0
    vdi_size: int = 0
    vm_state_size: int = 0
    copy_policy: int = 0  # 0: replicas, else erasure code
    store_policy: int = 0  # 0: plain map, 1: B-tree
    nr_copies: int = 1
    block_size_shift: int = 22
    snap_id: int = 1
    vdi_id: int = 0
    parent_vdi_id: int = 0
    btree_counter: int = 0

    def pack(self) -> bytes:
        """The 4664 bytes; UsageError or struct.error for what does not fit."""
        return _HEADER.pack(
            padded(self.name),
            padded(self.tag),
            self.create_time,
            self.snap_ctime,
            self.vm_clock_nsec,
            self.vdi_size,
            self.vm_state_size,
            self.copy_policy,
            self.store_policy,
            self.nr_copies,
            self.block_size_shift,
            self.snap_id,
            self.vdi_id,
            self.parent_vdi_id,
            self.btree_counter,
        )

    @classmethod
    def unpack(cls, data: Bytes) -> InodeHeader:
        """The header at the start of `data`; PeerError for bytes that no inode can have.

        A header passes when every client can work with it: a shift to shift by, at least one copy, real vids.
        """
        if len(data) < HEADER_SIZE:
            raise PeerError(f"inode header of {len(data)} bytes")
        name, tag, *numbers = _HEADER.unpack_from(data)
        header = cls(until_nul(name), until_nul(tag), *numbers)
        if not MIN_SHIFT <= header.block_size_shift <= MAX_SHIFT:
            raise PeerError(f"inode with objects of 2^{header.block_size_shift} bytes")
        if not header.nr_copies:
            raise PeerError("inode without copies")
        if max(header.vdi_id, header.parent_vdi_id) >= VID_COUNT:
            raise PeerError(f"inode with vid {header.vdi_id:x}, parent {header.parent_vdi_id:x}")
        return header

    @property
    def is_snapshot(self) -> bool:
        return self.snap_ctime != 0

    @property
    def is_deleted(self) -> bool:
        return not self.name

    @property
    def object_size(self) -> int:
        return 1 << self.block_size_shift

    @property
    def object_count(self) -> int:
        return objects_of(self.vdi_size, self.block_size_shift)


def objects_of(size: int, shift: int) -> int:
    """How many data objects of 2^shift bytes hold `size` bytes."""
    return (size + (1 << shift) - 1) >> shift


def nominal_size(oid: ObjectId, shift: int) -> int:
    """Size in bytes of the object (6.2); `shift` is its volume's, and counts for data and vmstate only."""
    if is_data(oid) or is_vmstate(oid):
        return 1 << shift
    if is_inode(oid):
        return INODE_SIZE
    if is_attribute(oid):
        return ATTRIBUTE_SIZE
    return BTREE_NODE_SIZE if is_btree(oid) else LEDGER_SIZE


def map_offset(index: int) -> int:
    """Where entry `index` of the map is in the inode object."""
    return MAP_OFFSET + MAP_ENTRY_SIZE * index


def entries_written(offset: int, length: int) -> range:
    """Entries that a write into the inode object touches, also partly.

    Empty unless the write lies completely inside the map: only such a write drops references (7.5).
    """
    if not length or offset < MAP_OFFSET or offset + length > MAP_END:
        return range(0)
    first = (offset - MAP_OFFSET) // MAP_ENTRY_SIZE
    last = (offset + length - 1 - MAP_OFFSET) // MAP_ENTRY_SIZE
    return range(first, last + 1)


def unpack_map(data: Bytes) -> array[int]:
    """The entries in `data`: vids, 0 for an object that does not exist. PeerError for a part of an entry."""
    if len(data) % MAP_ENTRY_SIZE:
        raise PeerError(f"object map of {len(data)} bytes")
    entries = array("I")
    entries.frombytes(data)
    return _little_endian(entries)


def pack_map(entries: array[int]) -> bytes:
    """The bytes of map entries (an array of type I)."""
    return _little_endian(array("I", entries)).tobytes()


def _little_endian(entries: array[int]) -> array[int]:
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


# Hyper volumes (7.6): the map area holds the root of a B-tree, further nodes are objects of their own.

BTREE_MAGIC: Final = 0x6274
BTREE_HEADER_SIZE: Final = 8
LEAF_DEPTH: Final = 1
INNER_DEPTH: Final = 2
_BTREE_HEADER: Final = Struct("<HHI")
_BTREE_LEAF: Final = Struct("<II")
_BTREE_INNER: Final = Struct("<I4xQ")


def empty_btree() -> bytes:
    """The root of a fresh hyper volume, to be stored at MAP_OFFSET."""
    return _BTREE_HEADER.pack(BTREE_MAGIC, LEAF_DEPTH, 0)


def btree_leaves(node: Bytes) -> list[tuple[int, int]] | None:
    """(index, vid) of every entry of a leaf; None for an inner node. PeerError for bytes that are no node."""
    depth, count = _btree_header(node)
    if depth != LEAF_DEPTH:
        return None
    body = memoryview(node)[BTREE_HEADER_SIZE:][: count * _BTREE_LEAF.size]
    return list(_BTREE_LEAF.iter_unpack(body))


def btree_children(node: Bytes) -> list[tuple[int, ObjectId]] | None:
    """(highest index, oid) of every child of an inner node; None for a leaf. PeerError for bytes that are no node."""
    depth, count = _btree_header(node)
    if depth != INNER_DEPTH:
        return None
    body = memoryview(node)[BTREE_HEADER_SIZE:][: count * _BTREE_INNER.size]
    return [(highest, ObjectId(oid)) for highest, oid in _BTREE_INNER.iter_unpack(body)]


def btree_used(head: Bytes) -> int:
    """Bytes of the node that are in use, told by its first 8; PeerError for bytes that are no node."""
    depth, count = _unpack_btree_header(head)
    return BTREE_HEADER_SIZE + count * (_BTREE_LEAF if depth == LEAF_DEPTH else _BTREE_INNER).size


def _btree_header(node: Bytes) -> tuple[int, int]:
    if btree_used(node) > len(node):
        raise PeerError(f"B-tree node of {len(node)} bytes is cut short")
    return _unpack_btree_header(node)


def _unpack_btree_header(head: Bytes) -> tuple[int, int]:
    if len(head) < BTREE_HEADER_SIZE:
        raise PeerError(f"B-tree node of {len(head)} bytes")
    magic, depth, count = _BTREE_HEADER.unpack_from(head)
    if magic != BTREE_MAGIC or depth not in (LEAF_DEPTH, INNER_DEPTH):
        raise PeerError(f"no B-tree node: magic {magic:x}, depth {depth}")
    return depth, count
