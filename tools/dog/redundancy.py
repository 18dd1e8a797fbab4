"""`dog vdi alter-copy` and `dog cluster alter-copy` (cli.md 2.6, 2.8). The results go to stderr, as they always did."""

from __future__ import annotations

from dataclasses import replace

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.limits import DEFAULT_COPIES
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure
from sheepdog.tools.dog.output import caution, confirm, text, warn
from sheepdog.tools.dog.values import parse_redundancy
from sheepdog.tools.dog.vdi_list import headers
from sheepdog.tools.dog.volumes import name_of, open_header


def _wanted(context: Context, subject: str, coded: str) -> int:
    if not context.flag("copies"):
        print(f"The {subject}'s redundancy level is not specified, use {DEFAULT_COPIES} as default.", flush=True)
        return DEFAULT_COPIES
    copies, policy = parse_redundancy(context.value("copies"))
    if policy:
        raise Failure(f"Changing redundancy level of erasure coded {coded} is not supported yet.", USAGE_ERROR)
    return copies


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
    copies = _wanted(context, "vdi", "vdi")
    connection = context.gateway()
    inode = open_header(connection, name_of(word))
    vid = Vid(inode.vdi_id)
    if inode.copy_policy:
        raise Failure(f"{word}'s copy policy is erasure code, changing it is not supported yet.")
    if inode.nr_copies == copies:
        raise Failure(f"{word}'s redundancy level is already set to {copies}, nothing changed.")
    if inode.parent_vdi_id or any(other.parent_vdi_id == vid for other in headers(connection)):
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


def cluster(context: Context) -> None:
    """Another default number of copies for volumes created later."""
    copies = _wanted(context, "cluster", "cluster")
    connection = context.gateway()
    context.nodes()
    found, _ = admin.cluster_info(connection)
    if found.copy_policy:
        raise Failure("The cluster's copy policy is erasure code, changing it is not supported yet.")
    if found.copies == copies:
        raise Failure(f"The cluster's redundancy level is already set to {copies}, nothing changed.")
    _ask(
        context,
        copies,
        "Caution! Changing cluster's redundancy level will affect",
        "all the VDIs to be created later.",
    )
    try:
        admin.alter_cluster_copies(connection, copies)
    except SheepError as error:
        raise Failure(f"Failed to change the cluster's redundancy level: {text(error.result)}") from error
    warn(f"The cluster's redundancy level is set to {copies}, the old one was {found.copies}.")
