"""Gives a volume objects of its own: `dog vdi create -P`, `dog vdi clone -P|-n`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import Connection, connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import create_header, read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset, pack_map
from sheepdog.cluster.wire.opcodes import Flags
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.volumes import Opened
from sheepdog.tools.dog.window import buffers, in_order

COPY_BATCH = 16  # objects copied before the map names them: little is lost when the command is interrupted


def fill_new(connection: Connection, name: bytes, target: Vid, source: Opened, indexes: Sequence[int]) -> None:
    """For a volume just made: it is deleted again if that fails, for nobody could tell it from a whole one."""
    try:
        _fill(connection, target, source, indexes)
    except BaseException:
        with suppress(OSError):
            admin.delete_volume(connection, name)
        raise


def _fill(connection: Connection, target: Vid, source: Opened, indexes: Sequence[int]) -> None:
    """Gives `target` (a plain volume) objects of its own at `indexes`, with the content that `source` has there."""
    channel = Channel(connection.address, patience_s=0, dial=connect_near)
    made: list[int] = []
    with Progress("copy", len(indexes) * source.inode.object_size) as progress:
        for index in in_order(_copies(channel, target, source, indexes)):
            made.append(index)
            progress.advance(source.inode.object_size)
            if len(made) == COPY_BATCH or index - made[0] >= COPY_BATCH:
                _name_objects(connection, target, made)
                made.clear()
    _name_objects(connection, target, made)
    channel.close()


def _copies(channel: Channel, target: Vid, source: Opened, indexes: Sequence[int]) -> Iterator[Callable[[], int]]:
    space = buffers()
    for index in indexes:
        yield partial(_copy_object, channel, target, source, index, next(space))


def _copy_object(channel: Channel, target: Vid, source: Opened, index: int, space: memoryview) -> int:
    """Creates one object, in parts if it is large; returns `index`."""
    owner, size, oid = source.owner(index), source.inode.object_size, data_oid(target, index)
    if not owner:
        _done(channel.ask(create_header(oid, 0, 0, 0, durable=True)))
        return index
    for offset in range(0, size, len(space)):
        part = space[: min(len(space), size - offset)]
        _done(channel.ask(read_header(data_oid(owner, index), offset, len(part)), b"", part), len(part))
        make = partial(write_header, oid) if offset else partial(create_header, oid, 0)
        _done(channel.ask(make(offset, len(part), durable=True), part))
    return index


def _done(answer: tuple[int, int], length: int = 0) -> None:
    if answer != (Result.SUCCESS, length):
        raise SheepError(answer[0] or Result.EIO)


def _name_objects(connection: Connection, target: Vid, indexes: list[int]) -> None:
    """Writes the map entries of created objects, one request for each run of neighbours."""
    start = 0
    for position in range(1, len(indexes) + 1):
        if position == len(indexes) or indexes[position] != indexes[position - 1] + 1:
            run = array("I", [target]) * (position - start)
            admin.write_object(connection, inode_oid(target), map_offset(indexes[start]), pack_map(run), Flags.DIRECT)
            start = position
