"""The wanted state in the cluster: one attribute of each exported volume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import PeerError, Result, UsageError
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE
from sheepdog.cluster.wire.opcodes import Flags
from sheepdog.cluster.wire.results import text_of
from sheepdog.frontends.iscsi.exports import KEY, Document


@dataclass(frozen=True, slots=True)
class Exported:
    """What is wanted of a volume."""

    volume: str
    object_size: int
    document: Document


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A volume of which nobody knows what is wanted, and a line that says so. None: not even its name is known."""

    volume: str | None
    problem: str


def read(connection: Connection, volume: bytes) -> Document | None:
    """What is wanted of one volume; None if it was never exported, UsageError if that cannot be understood."""
    try:
        oid = admin.attribute_id(connection, Attribute(volume, key=KEY).pack(), 0, 0)
    except SheepError as error:
        if error.result == Result.NO_OBJ:
            return None
        raise
    try:
        found = Attribute.unpack(admin.read_object(connection, oid, 0, ATTRIBUTE_SIZE))
    except PeerError as error:
        raise UsageError(f"its attribute 'iscsi' is damaged ({error})") from error
    return Document.unpack(found.value)


def write(connection: Connection, volume: bytes, document: Document, new: bool) -> None:
    """Keeps the document. With `new` it must be the first: of two hosts that begin at a time one starts over."""
    flags = Flags.ATTR_CREATE | (Flags.ATTR_EXCLUSIVE if new else 0)
    try:
        admin.attribute_id(connection, Attribute(volume, key=KEY, value=document.pack()).pack(), 0, flags)
    except SheepError as error:
        if new and error.result == Result.VDI_EXIST:
            raise UsageError("another host exports it just now: try again") from error
        raise


def begin(connection: Connection, volume: bytes) -> Document:
    """Keeps a document with nothing but a serial number; the same one for all who begin at a time."""
    document = Document()
    try:
        write(connection, volume, document, new=True)
    except UsageError:
        first = read(connection, volume)
        if first is None:
            raise
        return first
    return document


def documents(connection: Connection) -> Iterator[Exported | Unreadable]:
    """All volumes that are, or once were, exported, by name; before them those that cannot be read themselves."""
    working = []
    for header in inodes.headers(connection, inodes.volume_ids(connection)):
        if isinstance(header, InodeHeader):
            working += [] if header.is_snapshot else [header]
        else:
            yield Unreadable(None, f"the inode of the volume {header.vid:x} cannot be read: {text_of(header.result)}")
    for header in sorted(working, key=lambda header: header.name):
        volume = os.fsdecode(header.name)
        try:
            document = read(connection, header.name)
        except UsageError as error:
            yield Unreadable(volume, _line(f"{volume}: {error}"))
            continue
        except SheepError as error:
            yield Unreadable(volume, _line(f"{volume}: its attribute 'iscsi' cannot be read: {text_of(error.result)}"))
            continue
        if document is not None:
            yield Exported(volume, header.object_size, document)


def _line(text: str) -> str:
    """Anybody can write attributes: what is shown of one controls no terminal and makes no second line."""
    return "".join(character if character.isprintable() else "?" for character in text)
