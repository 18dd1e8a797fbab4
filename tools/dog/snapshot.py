"""`dog vdi snapshot|clone|rollback` (cli.md 2.6)."""

from __future__ import annotations

import os

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.strings import NAME_SIZE
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure, UsageFailure
from sheepdog.tools.dog.output import confirm, refusal, text, warn
from sheepdog.tools.dog.values import positive, snapshot_option
from sheepdog.tools.dog.volumes import (
    RECLAIM_BATCH,
    Opened,
    delete,
    name_of,
    open_header,
)

_ROLLBACK_QUESTION = """\
This operation discards any changes made since the previous
snapshot was taken.  Continue? [yes/no]: """


def snapshot(context: Context) -> None:
    """Freezes a volume under a tag; it goes on under a new vid."""
    word = context.argument(0)
    name = name_of(word)
    label = context.value("snapshot")
    if label.isascii() and label.isdigit():
        raise UsageFailure("Please specify a non-integer value for a snapshot tag name")
    tag = os.fsencode(label)
    if len(tag) >= NAME_SIZE:
        raise UsageFailure(f"The tag of a snapshot has at most {NAME_SIZE - 1} bytes")
    connection = context.gateway()
    try:
        inode = inodes.read_header(connection, admin.find(connection, name).vid)
    except SheepError as error:
        raise Failure(f"Failed to create snapshot for {word}: {text(error.result)}") from error
    if inode.store_policy:
        raise Failure("creating a snapshot of hypervolume is not supported")
    if context.flag("reduce_identical_snapshots") and Vid(inode.vdi_id) not in inodes.read_map(connection, inode):
        if context.verbose:
            warn(f"VDI {word} doesn't have its own objects, skipping creation of snapshot")
        return
    try:
        made = admin.snapshot_volume(connection, name, tag).vid
    except SheepError as error:
        if error.result == Result.VDI_EXIST:
            taken = f"maybe snapshot id (0) or tag ({label}) is existed"
            raise Failure(f"Failed to create snapshot for {word}, {taken}") from error
        raise Failure(f"Failed to create snapshot for {word}: {refusal(error.result)}") from error
    if context.verbose:
        vid = inodes.read_header(connection, made).parent_vdi_id  # others may have taken snapshots meanwhile
        if context.raw:
            print(f"{made:x} {vid:x}")
        else:
            print(f"new VID of original VDI: {made:x}, VDI ID of newly created snapshot: {vid:x}")


def clone(context: Context) -> None:
    """A new volume on top of a snapshot, or with -n a copy of it."""
    source_word = context.argument(0)
    if not context.flag("snapshot"):
        raise UsageFailure("Only snapshot VDIs can be cloned\nPlease specify the '-s' option")
    tag, snap_id = snapshot_option(context)
    word = context.argument(1, "Destination VDI name must be specified")
    name = name_of(word)
    connection = context.gateway()
    source = open_header(connection, name_of(source_word), tag, snap_id)
    if source.store_policy:
        raise Failure("creating a clone of hypervolume is not supported")
    alone = context.flag("no_share")
    try:
        made = _next_volume(connection, name, source, Vid(0) if alone else Vid(source.vdi_id))
    except SheepError as error:
        raise Failure(f"Failed to create VDI {word}: {text(error.result)}") from error
    if context.flag("prealloc") or alone:
        from sheepdog.tools.dog.filling import fill_new

        opened = Opened(source, inodes.read_map(connection, source))
        every = range(source.object_count)
        fill_new(connection, name, made, opened, every if context.flag("prealloc") else [*filter(opened.owner, every)])
    if context.verbose:
        print(f"{made:x}" if context.raw else f"VDI ID of newly created clone: {made:x}")


def rollback(context: Context) -> None:
    """Discards the working volume and goes on from a snapshot."""
    word = context.argument(0)
    name = name_of(word)
    if not context.flag("snapshot"):
        raise UsageFailure("Please specify the '-s' option")
    tag, snap_id = snapshot_option(context)
    batch = positive(context, "batched_reclamation", "number of batched reclamation", RECLAIM_BATCH)
    pause_s = positive(context, "interval", "interval of batched reclamation", 0)
    if not context.flag("force"):
        confirm(_ROLLBACK_QUESTION)
    connection = context.gateway()
    base = open_header(connection, name, tag, snap_id)
    try:
        working = _working(connection, name)
        if working is not None:
            delete(connection, working, name, batch=batch, pause_s=pause_s)
        made = _next_volume(connection, name, base, Vid(base.vdi_id))
    except SheepError as error:
        raise Failure(f"Failed to rollback VDI {word}: {refusal(error.result)}") from error
    if context.verbose:
        print(f"{made:x}" if context.raw else f"New VDI ID of rollbacked VDI: {made:x}")


def _working(connection: Connection, name: bytes) -> Opened | None:
    try:
        inode = inodes.read_header(connection, admin.find(connection, name).vid)
    except SheepError as error:
        if error.result == Result.NO_VDI:
            return None
        raise
    return Opened(inode, inodes.read_map(connection, inode))


def _next_volume(connection: Connection, name: bytes, inode: InodeHeader, base: Vid) -> Vid:
    """NEW_VDI with the size, redundancy and object size of `inode`."""
    return admin.new_volume(
        connection,
        name,
        inode.vdi_size,
        base,
        copies=inode.nr_copies,
        policy=inode.copy_policy,
        store_policy=inode.store_policy,
        shift=inode.block_size_shift,
    ).vid
