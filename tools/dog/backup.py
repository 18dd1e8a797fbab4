"""`dog vdi backup|restore`: the difference between two snapshots as a stream (cli.md 2.6).

Stream, little-endian: u32 version 1, u32 magic; for each changed object, ascending, u32 index, u32 offset, u32 length,
u32 check and `length` bytes; at the end u32 index 0xffffffff, u32 0, u32 number of objects, u32 check. Equal 512-byte
sectors at both ends of an object are left out. `check` is the CRC-32 of the header and of all records so far without
their checks, this one with its bytes included: a stream that lost, repeated or changed anything is refused.
Sheepdog 1.0 wrote zeros for the number and every check, and reads ours; nothing but zeros there is taken as its stream.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO
from zlib import crc32

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.messages import Buffer
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import text
from sheepdog.tools.dog.values import positive, snapshot_option, snapshot_value
from sheepdog.tools.dog.volumes import RECLAIM_BATCH, Opened, delete, name_of, open_volume

VERSION, MAGIC = 1, 0x11921192
END = 0xFFFFFFFF
SECTOR = 512
_HEADER = Struct("<II")
_RECORD = Struct("<IIII")
_FIELDS = Struct("<III")  # of a record, what its check covers


def _check(fields: bytes, data: Buffer = b"", before: int = 0) -> int:
    """CRC-32 of what came before, of a record's fields and of its data."""
    return crc32(data, crc32(fields, before))


# -- backup


def backup(context: Context) -> None:
    """What changed from one snapshot (-F) to another (-s), on stdout."""
    name = name_of(context.argument(0))
    if not context.flag("from") or not context.flag("snapshot"):
        raise UsageFailure("Please specify snapshots with '-F' and '-s' options")
    old_tag, old_id = snapshot_value(context.value("from"))
    tag, snap_id = snapshot_option(context)
    connection = context.gateway()
    context.nodes()
    old = open_volume(connection, name, old_tag, old_id)
    new = open_volume(connection, name, tag, snap_id)
    out = sys.stdout.buffer
    check, count = _check(_HEADER.pack(VERSION, MAGIC)), 0
    out.write(_HEADER.pack(VERSION, MAGIC))
    size = new.inode.object_size
    for index in range(max(old.inode.object_count, new.inode.object_count)):
        if old.owner(index) == new.owner(index):
            continue
        before, after = (_object(connection, one, index, size) for one in (old, new))
        start, end = _changed(before, after)
        if start < end:
            count += 1
            check = _check(_FIELDS.pack(index, start, end - start), after[start:end], check)
            out.write(_RECORD.pack(index, start, end - start, check))
            out.write(after[start:end])
    out.write(_RECORD.pack(END, 0, count, _check(_FIELDS.pack(END, 0, count), b"", check)))
    out.flush()


def _object(connection: Connection, volume: Opened, index: int, size: int) -> memoryview:
    owner = volume.owner(index)
    return memoryview(admin.read_object(connection, data_oid(owner, index), 0, size) if owner else bytes(size))


def _changed(before: memoryview, after: memoryview) -> tuple[int, int]:
    """The range of sectors in which two objects differ; empty if they do not."""
    start, end = 0, len(after)
    while start < end and before[start : start + SECTOR] == after[start : start + SECTOR]:
        start += SECTOR
    while end > start and before[end - SECTOR : end] == after[end - SECTOR : end]:
        end -= SECTOR
    return start, end


# -- restore


def restore(context: Context) -> None:
    """The working volume becomes a snapshot plus a stream from stdin, is frozen, and its former state goes on.

    Nothing is touched before the stream has proved to be one. The former state is itself kept as a
    snapshot meanwhile, so that a stream that breaks in the middle, or an interruption, loses nothing.
    """
    word = context.argument(0)
    name = name_of(word)
    if not context.flag("snapshot"):
        raise UsageFailure("We can restore a backup file only to snapshots\nPlease specify the '-s' option")
    tag, snap_id = snapshot_option(context)
    batch = positive(context, "batched_reclamation", "number of batched reclamation", RECLAIM_BATCH)
    pause_s = positive(context, "interval", "interval of batched reclamation", 0)
    if sys.stdin.isatty():
        raise Failure("stdin must be pipe", USAGE_ERROR)
    connection = context.gateway()
    context.nodes()
    try:
        base = admin.read_header(connection, admin.find(connection, name, tag, snap_id).vid)
    except SheepError as error:
        if error.result in (Result.NO_VDI, Result.NO_TAG):
            raise Failure(f"Snapshot ID {snap_id} or tag {os.fsdecode(tag)} doesn't exist") from error
        raise
    source = sys.stdin.buffer
    if _take(source, _HEADER.size) != _HEADER.pack(VERSION, MAGIC):
        raise Failure("The backup file is corrupted")
    former = _working(connection, name)
    # With a working volume this freezes it and goes on from `base`; without one it is a plain branch.
    _next(connection, name, base, Vid(base.vdi_id), snapshot=former is not None)
    try:
        _apply(context, name, source, base)
        failure = None
    except (Failure, OSError) as error:
        failure = error
    if former is not None:
        _resume(connection, name, former, keep=failure is None, batch=batch, pause_s=pause_s)
    elif failure is None:
        _next(connection, name, base, _vid(connection, name), snapshot=True)
    if failure is not None:
        raise failure


def _vid(connection: Connection, name: bytes) -> Vid:
    return admin.find(connection, name).vid


def _working(connection: Connection, name: bytes) -> InodeHeader | None:
    try:
        return admin.read_header(connection, _vid(connection, name))
    except SheepError as error:
        if error.result == Result.NO_VDI:
            return None
        raise


def _next(connection: Connection, name: bytes, like: InodeHeader, base: Vid, snapshot: bool) -> None:
    try:
        admin.new_volume(
            connection,
            name,
            like.vdi_size,
            base,
            snapshot,
            like.nr_copies,
            like.copy_policy,
            like.store_policy,
            like.block_size_shift,
        )
    except SheepError as error:
        raise Failure(f"failed to restore {os.fsdecode(name)}: {text(error.result)}") from error


def _resume(connection: Connection, name: bytes, former: InodeHeader, keep: bool, batch: int, pause_s: float) -> None:
    """The former state goes on: what was restored becomes a snapshot (`keep`) or is thrown away."""
    former_vid = Vid(former.vdi_id)
    if not keep:
        current = _working(connection, name)
        assert current is not None
        delete(connection, Opened(current, admin.read_map(connection, current)), name, batch=batch, pause_s=pause_s)
    _next(connection, name, former, former_vid, snapshot=keep)
    # The snapshot that held the former state was ours; its objects live on in the volume that has branched off it.
    frozen = Opened(former, admin.read_map(connection, former))
    delete(connection, frozen, name, b"", former.snap_id, batch, pause_s)


def _apply(context: Context, name: bytes, source: BinaryIO, base: InodeHeader) -> None:
    volume = BlockingVolume.open((context.host, context.port), name, patience_s=0)
    for index, offset, data in _records(source, base):
        start = index * base.object_size + offset
        volume.write(start, memoryview(data)[: max(0, volume.size - start)], durable=True)
    volume.close()


def _records(source: BinaryIO, base: InodeHeader) -> Iterator[tuple[int, int, Buffer]]:
    count, check, unchecked = 0, _check(_HEADER.pack(VERSION, MAGIC)), True
    while True:
        index, offset, length, said = _RECORD.unpack(_take(source, _RECORD.size))
        ends = index == END
        if not ends and (index >= base.object_count or offset + length > base.object_size):
            raise Failure("The backup file is corrupted")
        data = b"" if ends else _take(source, length)
        check = _check(_FIELDS.pack(index, offset, length), data, check)
        unchecked = unchecked and not said and not (ends and length)
        if (said != check and not unchecked) or (ends and not unchecked and length != count):
            raise Failure("The backup file is corrupted")
        if ends:
            return
        count += 1
        yield index, offset, data


def _take(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise Failure("The backup file is corrupted")
    return data
