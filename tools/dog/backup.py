"""`dog vdi backup|restore`: the difference between two snapshots as a stream (cli.md 2.6; its bytes: `difference`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import Connection, connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import read_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.difference import SECTOR, SIZE, Piece, Shape, Writer, pieces, proved
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import refusal, text
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.values import positive, snapshot_option, snapshot_value
from sheepdog.tools.dog.volumes import RECLAIM_BATCH, Opened, delete, name_of, open_volume
from sheepdog.tools.dog.window import CHUNK_BYTES, buffers, in_order, standard_input, unequal_range

RESTORING = b"before-restore"  # the tag of the state that goes on afterwards
_ZEROS = memoryview(bytes(CHUNK_BYTES))

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
    channel = Channel((context.host, context.port), patience_s=0, dial=connect_near)
    writer = Writer(sys.stdout.buffer)
    if new.inode.vdi_size > old.inode.vdi_size:
        writer.grown(new.inode.vdi_size)
    owners = enumerate(zip_longest(old.entries, new.entries, fillvalue=0))
    changed = [(index, *pair) for index, pair in owners if pair[0] != pair[1]]
    length = min(new.inode.object_size, CHUNK_BYTES)
    with Progress("backup", len(changed) * new.inode.object_size) as progress:
        for index, offset, data in in_order(_comparisons(channel, changed, new.inode.object_size, length)):
            if data:
                writer.add(index, offset, data)
            progress.advance(length)
    writer.end()


def _comparisons(
    channel: Channel, changed: list[tuple[int, int, int]], size: int, length: int
) -> Iterator[Callable[[], Piece]]:
    """Looks at objects whose owners, the old one and the new one, differ: in parts of `length` bytes."""
    before, after = buffers(), buffers()
    for index, old_owner, new_owner in changed:
        for offset in range(0, size, length):
            first = partial(_part, channel, old_owner, index, offset, next(before)[:length])
            second = partial(_part, channel, new_owner, index, offset, next(after)[:length])
            yield partial(_changed, index, offset, first, second)


def _part(channel: Channel, owner: int, index: int, offset: int, space: memoryview) -> memoryview:
    """Bytes of an object; zeros without one."""
    if not owner:
        return _ZEROS[: len(space)]
    result, got = channel.ask(read_header(data_oid(Vid(owner), index), offset, len(space)), b"", space)
    if result or got != len(space):
        raise SheepError(result or Result.EIO)
    return space


def _changed(index: int, offset: int, first: Callable[[], memoryview], second: Callable[[], memoryview]) -> Piece:
    """The sectors in which two versions differ, as the second has them; empty if they do not."""
    before, after = first(), second()
    start, end = unequal_range(before, after, SECTOR)
    return Piece(index, offset + start, after[start:end])


# -- restore


def restore(context: Context) -> None:
    """The working volume becomes a snapshot plus a stream from stdin, is frozen, and its former state goes on.

    Nothing is touched before the whole stream has proved to be sound. The former state is itself kept as a snapshot
    meanwhile, so that a failure or an interruption in the middle loses nothing. Its tag also keeps others out: two
    restores at a time would take each other's half of the work for the former state.
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
        base = inodes.read_header(connection, admin.find(connection, name, tag, snap_id).vid)
    except SheepError as error:
        if error.result in (Result.NO_VDI, Result.NO_TAG):
            raise Failure(f"Snapshot ID {snap_id} or tag {os.fsdecode(tag)} doesn't exist") from error
        raise
    shape = Shape(base.object_count, base.object_size)
    with proved(standard_input(), shape) as (source, total):
        former = _freeze(connection, name)
        failure: BaseException | None = None
        try:
            # With a working volume this freezes it once more and goes on from `base`; without one it is a plain branch.
            _next(connection, name, base, Vid(base.vdi_id), snapshot=former is not None)
            _apply(context, name, pieces(source, shape, buffers(), summed=False), total)
        except BaseException as error:  # also an interruption: the former state must go on
            failure = error
    if former is not None:
        _resume(connection, name, former, failure is None, batch, pause_s)
    elif failure is None:
        _next(connection, name, base, _vid(connection, name), snapshot=True)
    if failure is not None:
        raise failure


def _vid(connection: Connection, name: bytes) -> Vid:
    return admin.find(connection, name).vid


def _freeze(connection: Connection, name: bytes) -> Vid | None:
    """The working volume goes on under this vid, with nothing of its own; None without one."""
    try:
        return admin.snapshot_volume(connection, name, RESTORING).vid
    except SheepError as error:
        if error.result == Result.NO_VDI:
            return None
        word, tag = os.fsdecode(name), RESTORING.decode()
        if error.result == Result.VDI_EXIST:
            raise Failure(
                f"{word} is being restored, or was by a command that was killed.\n"
                f"Its snapshot {tag} has the state before: roll back to it if you want that, and delete it."
            ) from error
        raise Failure(f"failed to restore {word}: {refusal(error.result)}") from error


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


def _resume(connection: Connection, name: bytes, former: Vid, keep: bool, batch: int, pause_s: float) -> None:
    """The former state goes on: what was restored becomes a snapshot (`keep`) or is thrown away."""
    working = _vid(connection, name)
    if working != former:
        if not keep:
            delete(connection, _opened(connection, working), name, batch=batch, pause_s=pause_s)
        frozen = inodes.read_header(connection, former)
        _next(connection, name, frozen, former, snapshot=keep)
        if not frozen.tag:  # else somebody has taken this snapshot at the same time
            delete(connection, _opened(connection, former), name, b"", frozen.snap_id, batch, pause_s)
    # The snapshots that held the former state were ours; their objects live on in the volume that goes on.
    held = _opened(connection, admin.find(connection, name, RESTORING).vid)
    delete(connection, held, name, RESTORING, 0, batch, pause_s)


def _opened(connection: Connection, vid: Vid) -> Opened:
    inode = inodes.read_header(connection, vid)
    return Opened(inode, inodes.read_map(connection, inode))


def _apply(context: Context, name: bytes, changes: Iterator[Piece], total: int) -> None:
    volume = BlockingVolume.open((context.host, context.port), name, patience_s=0, dial=connect_near)
    with Progress("restore", total) as progress:
        for count in in_order(_writes(volume, changes)):
            progress.advance(count)
    volume.close()


def _writes(volume: BlockingVolume, changes: Iterator[Piece]) -> Iterator[Callable[[], int]]:
    """Writes of all changes; durable once the volume is closed."""
    for piece in changes:
        if piece.number == SIZE:
            volume.resize(max(volume.size, piece.size))
            continue
        start = piece.number * volume.object_size + piece.offset
        if start < volume.size:
            yield partial(_write, volume, start, piece.data[: volume.size - start])


def _write(volume: BlockingVolume, start: int, data: memoryview) -> int:
    volume.write(start, data)
    return len(data)
