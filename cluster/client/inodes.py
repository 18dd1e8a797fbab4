"""What the inodes of volumes say: headers and object maps, read many at once. Blocking, one connection.

Functions raise as those of client.admin do.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sheepdog.cluster.client.admin import object_request, plain, read_object
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import Request
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import VID_COUNT, ObjectId, Vid, inode_oid
from sheepdog.cluster.core.inode import (
    BTREE_HEADER_SIZE,
    HEADER_SIZE,
    MAP_OFFSET,
    InodeHeader,
    btree_children,
    btree_leaves,
    btree_used,
    unpack_map,
)
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.structures import BITMAP_SIZE, vids_in

LIST_WINDOW = 64  # inode headers asked for at once: hides the round trip, holds 300 KB


def read_header(connection: Connection, vid: Vid) -> InodeHeader:
    return InodeHeader.unpack(read_object(connection, inode_oid(vid), 0, HEADER_SIZE))


def read_map(connection: Connection, inode: InodeHeader) -> dict[int, Vid] | array[int]:
    """The object map: entry by index for a plain volume, the allocated entries of a hyper volume."""
    oid = inode_oid(Vid(inode.vdi_id))
    if not inode.store_policy:
        return unpack_map(read_object(connection, oid, MAP_OFFSET, 4 * inode.object_count))
    root = _read_node(connection, oid, MAP_OFFSET)
    found = dict(btree_leaves(root) or ())
    for _, child in btree_children(root) or ():
        found.update(btree_leaves(_read_node(connection, child, 0)) or ())
    return {index: Vid(vid) for index, vid in found.items()}


def empty_map(inode: InodeHeader) -> array[int]:
    """The map of a plain volume without any object."""
    return array("I", bytes(4 * inode.object_count))


def _read_node(connection: Connection, oid: ObjectId, offset: int) -> Buffer:
    used = btree_used(read_object(connection, oid, offset, BTREE_HEADER_SIZE))
    if used > BTREE_NODE_SIZE:
        raise PeerError(f"B-tree node of {used} bytes")
    return read_object(connection, oid, offset, used)


def allocated(entries: dict[int, Vid] | array[int]) -> Iterator[tuple[int, Vid]]:
    """(index, owner) of every object that exists, ascending."""
    if isinstance(entries, dict):
        yield from sorted(entries.items())
    else:
        for index, vid in enumerate(entries):
            if vid:
                yield index, Vid(vid)


_RECYCLED = 1 << 16  # of 2^24: names hardly ever hash to so low a vid, and if one does all volumes are looked at


def volume_ids(connection: Connection, deleted: bool = False, name: bytes | None = None) -> list[Vid]:
    """Every vid in use, ascending; with `deleted` also of deleted volumes; with `name` only those that may have it."""
    used = vids_in(plain(connection, Opcode.READ_VDIS, limit=BITMAP_SIZE))
    if name is not None:
        used = _chain(name, used)
    if deleted or not used:
        return [Vid(vid) for vid in used]
    gone = frozenset(vids_in(plain(connection, Opcode.READ_DEL_VDIS, limit=BITMAP_SIZE)))
    return [Vid(vid) for vid in used if vid not in gone]


def _chain(name: bytes, used: list[int]) -> list[int]:
    """A name's volumes have the vids from its hash on, without a gap (protocol.md 6.3).

    Not after `format -R`, which gives the lowest free ones.
    """
    if used and used[0] < _RECYCLED:
        return used
    taken = dict.fromkeys(used)
    vid: int = vid_of_name(name) or 1
    found: list[int] = []
    while vid in taken and len(found) < len(used):
        found.append(vid)
        vid = (vid + 1) % VID_COUNT or 1
    return sorted(found)


class Unread(NamedTuple):
    """An inode that could not be read."""

    vid: Vid
    result: int


class Contents(NamedTuple):
    """Header and object map of a volume: entry by index for a plain one, the allocated entries of a hyper volume."""

    inode: InodeHeader
    entries: dict[int, Vid] | array[int]


def headers(connection: Connection, vids: Iterable[Vid], deleted: bool = False) -> Iterator[InodeHeader | Unread]:
    """The inode headers of these volumes in their order, many requests at once; those of deleted ones only if asked."""
    for window in _windows(vids):
        found: dict[Vid, InodeHeader | Unread] = {}

        def answer(
            request: Request, result: int, data: Buffer, header: bytes, found: dict[Vid, InodeHeader | Unread] = found
        ) -> list[Request]:
            if result == Result.SUCCESS and len(data) == HEADER_SIZE:
                found[request.step] = InodeHeader.unpack(data)
            else:
                found[request.step] = Unread(request.step, result or Result.EIO)
            return []

        connection.exchange([_header_request(vid) for vid in window], answer)
        for vid in window:
            one = found[vid]
            if isinstance(one, Unread) or deleted or not one.is_deleted:
                yield one


def contents(connection: Connection, vids: Iterable[Vid], name: bytes | None = None) -> Iterator[Contents | Unread]:
    """Headers and maps of the volumes (of this name) that live, in their order, many requests at once."""
    for window in _windows(vids):
        inodes: dict[Vid, InodeHeader] = {}
        found: dict[Vid, Contents | Unread] = {}

        def answer(
            request: Request,
            result: int,
            data: Buffer,
            header: bytes,
            inodes: dict[Vid, InodeHeader] = inodes,
            found: dict[Vid, Contents | Unread] = found,
        ) -> list[Request]:
            vid: Vid = request.step
            if result or len(data) != request.limit:
                found[vid] = Unread(vid, result or Result.EIO)
            elif vid in inodes:
                found[vid] = Contents(inodes[vid], unpack_map(data))
            else:
                inodes[vid] = inode = InodeHeader.unpack(data)
                if not inode.is_deleted and not inode.store_policy and (name is None or inode.name == name):
                    return [_map_request(inode)]
            return []

        connection.exchange([_header_request(vid) for vid in window], answer)
        for vid in window:
            if vid in found:
                yield found[vid]
            elif not (inode := inodes[vid]).is_deleted and inode.store_policy and name in (None, inode.name):
                try:
                    yield Contents(inode, read_map(connection, inode))
                except SheepError as error:
                    yield Unread(vid, error.result)


def _windows(vids: Iterable[Vid]) -> Iterator[list[Vid]]:
    every = list(vids)
    for start in range(0, len(every), LIST_WINDOW):
        yield every[start : start + LIST_WINDOW]


def _map_request(inode: InodeHeader) -> Request:
    vid, length = Vid(inode.vdi_id), 4 * inode.object_count
    return Request(object_request(Opcode.READ_OBJ, inode_oid(vid), MAP_OFFSET, length, Flags.DIRECT), b"", length, vid)


def _header_request(vid: Vid) -> Request:
    header = object_request(Opcode.READ_OBJ, inode_oid(vid), 0, HEADER_SIZE, Flags.DIRECT)
    return Request(header, b"", HEADER_SIZE, vid)
