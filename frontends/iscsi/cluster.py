"""The wanted state in the cluster: one attribute of each exported volume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import Result, UsageError
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE
from sheepdog.cluster.wire.opcodes import Flags
from sheepdog.frontends.iscsi.exports import KEY, Document


@dataclass(frozen=True, slots=True)
class Exported:
    """A volume with its document, or why that cannot be read."""

    volume: str
    object_size: int
    document: Document | None
    problem: str = ""


def read(connection: Connection, volume: bytes) -> Document | None:
    """What is wanted of one volume; None if it was never exported."""
    try:
        oid = admin.attribute_id(connection, Attribute(volume, key=KEY).pack(), 0, 0)
    except SheepError as error:
        if error.result == Result.NO_OBJ:
            return None
        raise
    return Document.unpack(Attribute.unpack(admin.read_object(connection, oid, 0, ATTRIBUTE_SIZE)).value)


def write(connection: Connection, volume: bytes, document: Document, new: bool) -> None:
    """Keeps the document. With `new` it must be the first: of two hosts that begin at a time one starts over."""
    flags = Flags.ATTR_CREATE | (Flags.ATTR_EXCLUSIVE if new else 0)
    try:
        admin.attribute_id(connection, Attribute(volume, key=KEY, value=document.pack()).pack(), 0, flags)
    except SheepError as error:
        if new and error.result == Result.VDI_EXIST:
            raise UsageError("another host exports it just now: try again") from error
        raise


def documents(connection: Connection) -> Iterator[Exported]:
    """All volumes that are, or once were, exported; by name."""
    working = [
        header
        for header in inodes.headers(connection, inodes.volume_ids(connection))
        if isinstance(header, InodeHeader) and not header.is_snapshot
    ]
    for header in sorted(working, key=lambda header: header.name):
        volume = os.fsdecode(header.name)
        try:
            document = read(connection, header.name)
        except UsageError as error:
            yield Exported(volume, header.object_size, None, str(error))
            continue
        if document is not None:
            yield Exported(volume, header.object_size, document)
