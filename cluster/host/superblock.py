"""Who a directory belongs to: META/superblock and DISK/.disk (docs/format.md).

A node has an id of 16 random bytes, made with its META. Every disk carries the id of its node, one of its own, and its
size when it was first used, so that its weight on the node's ring stays what it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

from sheepdog.cluster.core.errors import Corrupt, UsageError
from sheepdog.cluster.host.directory import read_file, write_file
from sheepdog.cluster.host.disk import Disk

FORMAT: Final = 1
_NODE = Struct("<8sII16s")  # magic, format, zero, node id
_NODE_MAGIC: Final = b"SHEEPMET"
_DISK = Struct("<8sII16s16sQ")  # magic, format, zero, node id, disk id, size in bytes
_DISK_MAGIC: Final = b"SHEEPDSK"
RandomBytes = Callable[[int], bytes]


class DiskIdentity(NamedTuple):
    """What DISK/.disk says."""

    node: bytes
    disk: bytes
    size: int


def node_identity(disk: Disk, directory: str, random_bytes: RandomBytes = os.urandom) -> bytes:
    """The node's id, made when there is none; UsageError for a newer or damaged superblock."""
    data = _read(disk, f"{directory}/superblock", _NODE, _NODE_MAGIC)
    if data is not None:
        node: bytes = _NODE.unpack(data)[3]
        return node
    node = random_bytes(16)
    write_file(disk, directory, "superblock", _NODE.pack(_NODE_MAGIC, FORMAT, 0, node))
    return node


def read_disk_identity(disk: Disk, directory: str) -> DiskIdentity | None:
    """None for a directory that no node has used; UsageError for a newer or damaged one."""
    data = _read(disk, f"{directory}/.disk", _DISK, _DISK_MAGIC)
    return None if data is None else DiskIdentity(*_DISK.unpack(data)[3:])


def disk_identity(disk: Disk, directory: str, node: bytes, random_bytes: RandomBytes = os.urandom) -> DiskIdentity:
    """The disk's identity, made when there is none; UsageError when it belongs to another node."""
    identity = read_disk_identity(disk, directory)
    if identity is None:
        identity = DiskIdentity(node, random_bytes(16), disk.space(directory).total)
        write_file(disk, directory, ".disk", _DISK.pack(_DISK_MAGIC, FORMAT, 0, *identity))
    elif identity.node != node:
        raise UsageError(f"{directory} belongs to the store of another node ({identity.node.hex()}), it is left alone")
    return identity


def _read(disk: Disk, path: str, layout: Struct, magic: bytes) -> bytes | None:
    try:
        data = read_file(disk, path)
    except Corrupt as error:
        raise UsageError(f"{path}: {error}") from error
    if data is None:
        return None
    if len(data) < 12 or data[:8] != magic:
        raise UsageError(f"{path}: not a file of this system")
    form = int.from_bytes(data[8:12], "little")
    if form != FORMAT or len(data) != layout.size:
        raise UsageError(f"{path}: format {form}, this version reads {FORMAT}")
    return data
