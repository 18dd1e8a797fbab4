"""`dog vdi alter-copy` and `dog cluster alter-copy` (cli.md 2.6, 2.8). The results go to stderr, as they always did."""

from __future__ import annotations

import time
from dataclasses import replace

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import DEFAULT_COPIES
from sheepdog.cluster.core.moves import MOVED_TAG
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import caution, confirm, redundancy, text, warn
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.values import parse_redundancy
from sheepdog.tools.dog.vdi_list import headers
from sheepdog.tools.dog.volumes import Opened, name_of, open_header, open_volume

LATE_WRITES_S = 1.0  # clients name in the old map what they made before the snapshot: until then nothing is moved


def _wanted(context: Context, subject: str) -> tuple[int, int]:
    """(copies, policy byte)"""
    if not context.flag("copies"):
        print(f"The {subject}'s redundancy level is not specified, use {DEFAULT_COPIES} as default.", flush=True)
        return DEFAULT_COPIES, 0
    return parse_redundancy(context.value("copies"))


def _ask(context: Context, copies: int, *lines: str) -> None:
    if context.flag("force"):
        return
    count = len(context.nodes())
    if copies > count:
        confirm(
            f"Number of copies ({copies}) is larger than number of nodes ({count}).\n"
            "Are you sure you want to continue? [yes/no]: "
        )
    caution(*lines)


def volume(context: Context) -> None:
    """Another number of copies for one standalone volume; recovery follows."""
    word = context.argument(0)
    copies, policy = _wanted(context, "vdi")
    connection = context.gateway()
    inode = open_header(connection, name_of(word))
    vid = Vid(inode.vdi_id)
    unfinished = _moved_from(connection, inode)
    if unfinished is not None or policy or inode.copy_policy:
        _convert(context, connection, inode, unfinished, copies, policy)
        return
    if inode.nr_copies == copies:
        raise Failure(f"{word}'s redundancy level is already set to {copies}, nothing changed.")
    child = inode.parent_vdi_id and not _shares_nothing(connection, inode)
    if child or any(other.parent_vdi_id == vid for other in headers(connection)):
        raise Failure(
            "Only standalone vdi supports changing redundancy level.\n"
            f"Please clone {word} with -n (--no-share) option first."
        )
    _ask(
        context,
        copies,
        "Caution! Changing VDI's redundancy level will affect",
        "the VDI itself only and trigger recovery.",
    )
    try:
        admin.write_object(connection, inode_oid(vid), 0, replace(inode, nr_copies=copies).pack())
        admin.alter_volume_copies(connection, vid, copies, inode.block_size_shift)
    except SheepError as error:
        raise Failure(f"Failed to change redundancy level of {word}: {text(error.result)}") from error
    warn(f"{word}'s redundancy level is set to {copies}, the old one was {inode.nr_copies}.")


def _shares_nothing(connection: Connection, inode: InodeHeader) -> bool:
    """The parent was only made to change the redundancy, and has gone since: all objects are the volume's own."""
    return inodes.read_header(connection, Vid(inode.parent_vdi_id)).tag == MOVED_TAG


def _moved_from(connection: Connection, inode: InodeHeader) -> InodeHeader | None:
    """The snapshot that an earlier alter-copy of the volume took and did not delete."""
    parents = [other for other in headers(connection) if other.vdi_id == inode.parent_vdi_id]
    return next((other for other in parents if other.name == inode.name and other.tag == MOVED_TAG), None)


def _convert(
    context: Context,
    connection: Connection,
    inode: InodeHeader,
    unfinished: InodeHeader | None,
    copies: int,
    policy: int,
) -> None:
    """From, to, or between erasure codes: the volume gets objects of the new kind while it is in use."""
    word, name = context.argument(0), inode.name
    same = (inode.nr_copies, inode.copy_policy) == (copies, policy)
    now, wanted = (redundancy(inode.nr_copies, inode.copy_policy), redundancy(copies, policy))
    if unfinished is None:
        if same:
            raise Failure(f"{word}'s redundancy level is already set to {wanted}, nothing changed.")
        if inode.store_policy:
            raise Failure(f"{word} is a hyper volume: its redundancy level stays.")
        _ask(
            context,
            copies,
            "Caution! All objects of the volume are written anew;",
            "its snapshots keep the redundancy level that they have.",
        )
    elif not same:
        raise Failure(f"An earlier change of {word} to {now} was interrupted: finish it with -c {now} first.")
    try:
        if unfinished is None:
            admin.snapshot_volume(connection, name, MOVED_TAG, copies, policy)
        time.sleep(LATE_WRITES_S)
        _move_all(connection, name)
        left = _moved_from(connection, open_header(connection, name))
        if left is not None:
            admin.delete_volume(connection, name, snap_id=left.snap_id)
    except SheepError as error:
        raise Failure(
            f"Failed to change redundancy level of {word}: {text(error.result)}\nThe same command goes on from there."
        ) from error
    warn(f"{word}'s redundancy level is set to {wanted}" + ("." if same else f", the old one was {now}."))


def _move_all(connection: Connection, name: bytes) -> None:
    """Until the volume owns all its objects."""
    opened = open_volume(connection, name)
    with Progress("alter-copy", _shared_bytes(opened)) as progress:
        while left := _shared_bytes(opened):
            admin.move_objects(connection, opened.vid)
            opened = open_volume(connection, name)
            progress.advance(left - _shared_bytes(opened))


def _shared_bytes(opened: Opened) -> int:
    """Of the objects that are not its own yet."""
    return opened.inode.object_size * sum(owner not in (0, opened.vid) for owner in opened.entries)


def cluster(context: Context) -> None:
    """Another default redundancy for volumes created later."""
    copies, policy = _wanted(context, "cluster")
    connection = context.gateway()
    context.nodes()
    found, _ = admin.cluster_info(connection)
    now, wanted = redundancy(found.copies, found.copy_policy), redundancy(copies, policy)
    if now == wanted:
        raise Failure(f"The cluster's redundancy level is already set to {wanted}, nothing changed.")
    _ask(
        context,
        copies,
        "Caution! Changing cluster's redundancy level will affect",
        "all the VDIs to be created later.",
    )
    try:
        admin.alter_cluster_copies(connection, copies, policy)
    except SheepError as error:
        raise Failure(f"Failed to change the cluster's redundancy level: {text(error.result)}") from error
    warn(f"The cluster's redundancy level is set to {wanted}, the old one was {now}.")
