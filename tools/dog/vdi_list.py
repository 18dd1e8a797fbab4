"""`dog vdi list` (cli.md 2.6). Scripts parse both forms of a row; the table's are wider than their header."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sheepdog.cluster.client import inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import ObjectId, Vid, index_of, inode_oid, is_data, vid_of
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import minute, reason, redundancy, size_text, text, warn
from sheepdog.tools.dog.values import parse_oid

_COUNTED, _PARTS = 256, 16  # so few entries of a map are counted one by one; others in so many parts
_HEADER = "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift"


class Row(NamedTuple):
    """One volume: its header, its map, and how many objects it owns and shares."""

    inode: InodeHeader
    entries: dict[int, Vid] | array[int]
    own: int
    shared: int

    @property
    def is_clone(self) -> bool:
        return self.inode.snap_id == 1 and self.inode.parent_vdi_id != 0

    @property
    def flag(self) -> str:
        """`s` snapshot, `c` clone, else blank."""
        if self.inode.is_snapshot:
            return "s"
        return "c" if self.is_clone else " "


def run(context: Context) -> None:
    name = context.optional(0)
    oid = parse_oid(context.value("oid")) if context.flag("oid") else None
    try:
        connection = context.gateway()
        if not context.raw and not context.json:
            print(_HEADER)
        if oid is not None and not is_data(oid):
            raise Failure()
        found = [
            row
            for row in volumes(connection, None if name is None else os.fsencode(name))
            if oid is None or _refers(row, oid)
        ]
    except SheepError as error:
        raise Failure(reason(error), 2) from error
    except OSError as error:
        raise Failure(f"Failed to read VDI bitmap: {reason(error)}", 2) from error
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json([record(row) for row in found])
        return
    for row in found:
        print(raw_row(row) if context.raw else table_row(row))


def volumes(connection: Connection, name: bytes | None = None) -> Iterator[Row]:
    """Every volume (of this name) in ascending order of vid; one that cannot be read is named on stderr."""
    return rows(connection, inodes.volume_ids(connection, name=name), name)


def rows(connection: Connection, vids: Iterable[Vid], name: bytes | None = None) -> Iterator[Row]:
    """`volumes` among these vids."""
    for found in inodes.contents(connection, vids, name):
        if isinstance(found, inodes.Unread):
            unreadable(found.vid, found.result)
            continue
        inode, entries = found
        if isinstance(entries, array):
            own, holes = _count(entries, inode.vdi_id)
        else:
            own, holes = sum(vid == inode.vdi_id for vid in entries.values()), 0
        yield Row(inode, entries, own, len(entries) - holes - own)


def _count(entries: array[int], vid: int) -> tuple[int, int]:
    """How many entries name this vid, and how many nothing.

    Maps are long, and most of their parts are of one kind: to compare these at once takes a tenth of the time.
    """
    size = len(entries)
    first = entries[0] if size else 0
    if first in (0, vid) and entries == array("I", [first]) * size:
        return (size, 0) if first else (0, size)
    if size <= _COUNTED:
        return entries.count(vid), entries.count(0)
    step = -(-size // _PARTS)
    parts = [_count(entries[start : start + step], vid) for start in range(0, size, step)]
    return sum(own for own, _ in parts), sum(holes for _, holes in parts)


def headers(connection: Connection, deleted: bool = False) -> Iterator[InodeHeader]:
    """The inode headers of all volumes in ascending order of vid; those that cannot be read are named on stderr."""
    for found in inodes.headers(connection, inodes.volume_ids(connection, deleted)):
        if isinstance(found, inodes.Unread):
            unreadable(found.vid, found.result)
        else:
            yield found


def unreadable(vid: Vid, result: int) -> None:
    warn(f"Failed to read object {inode_oid(vid):016x} {text(result)}\nFailed to read inode header")


def _refers(row: Row, oid: ObjectId) -> bool:
    index = index_of(oid)
    if isinstance(row.entries, dict):
        return row.entries.get(index) == vid_of(oid)
    return index < len(row.entries) and row.entries[index] == vid_of(oid)


def shown_id(inode: InodeHeader) -> int:
    """The working volume shows 0."""
    return inode.snap_id if inode.is_snapshot else 0


def table_row(row: Row) -> str:
    inode = row.inode
    sizes = [size_text(size, False) for size in _sizes(row)]
    return (
        f"{row.flag} {decoded(inode.name):<8} {shown_id(inode):5d} {sizes[0]:>7} {sizes[1]:>7} {sizes[2]:>7} "
        f"{minute(inode.create_time >> 32)}  {inode.vdi_id:7x} "
        f"{redundancy(inode.nr_copies, inode.copy_policy):>6} {decoded(inode.tag):>13} {inode.block_size_shift:3d}"
    )


def raw_row(row: Row) -> str:
    inode = row.inode
    name = "".join(f"\\{letter}" if letter.isspace() or letter == "\\" else letter for letter in decoded(inode.name))
    size, used, shared = _sizes(row)
    return (
        f"{row.flag if row.flag != ' ' else '='} {name} {shown_id(inode)} {size} {used} {shared} "
        f"{inode.create_time >> 32} {inode.vdi_id:x} {redundancy(inode.nr_copies, inode.copy_policy)} "
        f"{decoded(inode.tag)} {inode.block_size_shift}"
    )


def _sizes(row: Row) -> tuple[int, int, int]:
    unit = row.inode.object_size
    return row.inode.vdi_size, row.own * unit, row.shared * unit


def record(row: Row) -> dict[str, Any]:
    """The JSON form of a row."""
    inode = row.inode
    size, used, shared = _sizes(row)
    return {
        "name": decoded(inode.name),
        "kind": {"s": "snapshot", "c": "clone", " ": "volume"}[row.flag],
        "snapshot_id": shown_id(inode),
        "tag": decoded(inode.tag),
        "vdi_id": f"{inode.vdi_id:x}",
        "parent": f"{inode.parent_vdi_id:x}",
        "size": size,
        "used": used,
        "shared": shared,
        "created": inode.create_time >> 32,
        "redundancy": redundancy(inode.nr_copies, inode.copy_policy),
        "object_size": inode.object_size,
        "hyper": bool(inode.store_policy),
    }


def decoded(name: bytes) -> str:
    """Names are bytes; what is not UTF-8 goes out as it came in."""
    return os.fsdecode(name)
