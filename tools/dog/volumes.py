"""Steps that several `dog vdi` commands share: opening by name, clearing a map."""

from __future__ import annotations

import os
import time
from array import array
from typing import NamedTuple, TypeAlias

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import InodeHeader, map_offset
from sheepdog.cluster.core.limits import MAX_MAP_ENTRIES
from sheepdog.cluster.core.strings import NAME_SIZE
from sheepdog.tools.dog.options import USAGE_ERROR, Failure
from sheepdog.tools.dog.output import text

RECLAIM_BATCH = 128  # objects whose entries one request clears
AT_ONCE = 16_384  # objects that a deletion itself frees: 3 s, in which no other volume is created or snapshotted
MAX_HYPER_SIZE = 1 << 54  # 2^32 objects of 4 MiB

Entries: TypeAlias = "dict[int, Vid] | array[int]"


class Opened(NamedTuple):
    """A volume's header and its object map."""

    inode: InodeHeader
    entries: Entries

    @property
    def vid(self) -> Vid:
        return Vid(self.inode.vdi_id)

    def owner(self, index: int) -> Vid:
        """Owner of data object `index`; 0 for a hole."""
        if isinstance(self.entries, dict):
            return self.entries.get(index, Vid(0))
        return Vid(self.entries[index]) if index < len(self.entries) else Vid(0)


def name_of(word: str) -> bytes:
    """A volume's name from the command line; Failure if it is longer than its field."""
    name = os.fsencode(word)
    if not 0 < len(name) < NAME_SIZE:
        raise Failure(
            f"VDI name is too long, maximum is {NAME_SIZE - 1} bytes" if name else "VDI name is empty", USAGE_ERROR
        )
    return name


def not_opened(name: bytes, tag: bytes, snap_id: int, result: int) -> str:
    """The words for a lookup that failed."""
    where = f"snapshot id: {snap_id} snapshot tag: {os.fsdecode(tag)}"
    return f"Failed to open VDI {os.fsdecode(name)} ({where}): {text(result)}"


def find(connection: Connection, name: bytes, tag: bytes = b"", snap_id: int = 0, code: int = 1) -> Vid:
    """The vid of a volume or snapshot; Failure with the usual words and `code` if there is none."""
    try:
        return admin.find(connection, name, tag, snap_id).vid
    except SheepError as error:
        raise Failure(not_opened(name, tag, snap_id, error.result), code) from error


def open_header(connection: Connection, name: bytes, tag: bytes = b"", snap_id: int = 0, code: int = 1) -> InodeHeader:
    """The inode header of a volume or snapshot."""
    return inodes.read_header(connection, find(connection, name, tag, snap_id, code))


def open_volume(connection: Connection, name: bytes, tag: bytes = b"", snap_id: int = 0, code: int = 1) -> Opened:
    """Header and map of a volume or snapshot."""
    inode = open_header(connection, name, tag, snap_id, code)
    return Opened(inode, inodes.read_map(connection, inode))


def size_limit(shift: int, hyper: bool) -> int:
    """The largest volume, in bytes."""
    return MAX_HYPER_SIZE if hyper else MAX_MAP_ENTRIES << shift


def clear_map(
    connection: Connection, volume: Opened, batch: int = RECLAIM_BATCH, pause_s: float = 0, limit: int | None = None
) -> None:
    """Zeroes the map in requests that cover `batch` objects each; at most `limit` objects are given back.

    The map of a hyper volume is left alone: the gateway walks the tree when the volume is deleted.
    """
    if isinstance(volume.entries, dict):
        return
    used = [index for index, vid in enumerate(volume.entries) if vid][:limit]
    for start in range(0, len(used), batch):
        if start and pause_s:
            time.sleep(pause_s)
        part = used[start : start + batch]
        size = 4 * (part[-1] - part[0] + 1)
        admin.write_object(connection, inode_oid(volume.vid), map_offset(part[0]), bytes(size))


def delete(
    connection: Connection,
    volume: Opened,
    name: bytes,
    tag: bytes = b"",
    snap_id: int = 0,
    batch: int = RECLAIM_BATCH,
    pause_s: float = 0,
) -> None:
    """Deletes the volume or snapshot: in one step, unless it is large or batches were asked for.

    Those are cleared first; who clones such a snapshot at the same time gets what is left of it.
    """
    used = 0 if isinstance(volume.entries, dict) else len(volume.entries) - volume.entries.count(0)
    if used > AT_ONCE or pause_s or batch != RECLAIM_BATCH:
        clear_map(connection, volume, batch, pause_s)
    admin.delete_volume(connection, name, tag, snap_id)
