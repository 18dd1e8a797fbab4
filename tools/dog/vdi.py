"""`dog vdi create|delete|resize` (cli.md 2.6)."""

from __future__ import annotations

from array import array
from dataclasses import replace

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import objects_of
from sheepdog.cluster.core.limits import DEFAULT_SHIFT
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import human_size, parse_size, refusal, text, warn
from sheepdog.tools.dog.values import parse_redundancy, parse_shift, positive, snapshot_option
from sheepdog.tools.dog.volumes import (
    RECLAIM_BATCH,
    Opened,
    clear_map,
    name_of,
    open_header,
    open_volume,
    size_limit,
)
from sheepdog.tools.dog.volumes import delete as delete_volume

RESIZE_ATTEMPTS = 10  # each of them overtaken by a snapshot


def create(context: Context) -> None:
    """A new volume, thin unless -P."""
    copies, policy = parse_redundancy(context.value("copies")) if context.flag("copies") else (0, 0)
    hyper, given_shift = context.flag("hyper"), context.flag("block_size_shift")
    shift = parse_shift(context.value("block_size_shift")) if given_shift else 0
    if hyper and given_shift:
        raise Failure("Don't specify both -y and -z options, please")
    word = context.argument(0)
    name = name_of(word)
    size = parse_size(context.argument(1, "Please specify the VDI size"))
    connection = context.gateway()
    if hyper:
        shift = DEFAULT_SHIFT
    elif not given_shift:
        found, _ = admin.cluster_info(connection)
        if not found.ctime:
            raise Failure(f"Failed to create VDI {word}: {text(Result.WAIT_FOR_FORMAT)}")
        shift = found.block_size_shift
    limit = size_limit(shift, hyper)
    if size > limit:
        raise UsageFailure("VDI size is too large" if hyper else _too_large(limit))
    if hyper and context.flag("prealloc"):
        raise Failure("preallocation of a hyper volume is not supported")
    try:
        made = admin.new_volume(
            connection, name, size, copies=copies, policy=policy, store_policy=int(hyper), shift=shift
        )
    except SheepError as error:
        raise Failure(f"Failed to create VDI {word}: {text(error.result)}") from error
    if context.flag("prealloc"):
        from sheepdog.tools.dog.filling import fill_new

        count = objects_of(size, shift)
        empty = Opened(inodes.read_header(connection, made.vid), array("I", bytes(4 * count)))
        fill_new(connection, name, made.vid, empty, range(count))
    if context.verbose:
        print(f"{made.vid:x}" if context.raw else f"VDI ID of newly created VDI: {made.vid:x}")


def _too_large(limit: int) -> str:
    return (
        f"VDI size is larger than {human_size(limit)} bytes, please use '-y' to create a hyper volume with size up to "
        "16 PB bytes or use '-z' to create larger object size volume"
    )


def delete(context: Context) -> None:
    """Deletes a volume or snapshot. Status 0 even if there is none: clean-up scripts depend on it."""
    tag, snap_id = snapshot_option(context)
    batch = positive(context, "batched_reclamation", "number of batched reclamation", RECLAIM_BATCH)
    pause_s = positive(context, "interval", "interval of batched reclamation", 0)
    most = positive(context, "max_reclaim", "maximum number of reclamation", 0)
    name = name_of(context.argument(0))
    connection = context.gateway()
    volume = open_volume(connection, name, tag, snap_id, code=0)
    try:
        if most:
            clear_map(connection, volume, batch, pause_s, most)
        else:
            delete_volume(connection, volume, name, tag, snap_id, batch, pause_s)
    except SheepError as error:
        warn(f"Failed to delete {context.argument(0)}: {refusal(error.result)}")


def resize(context: Context) -> None:
    """Grows a volume."""
    name = name_of(context.argument(0))
    size = parse_size(context.argument(1, "Please specify the new size for the VDI"))
    connection = context.gateway()
    result = 0
    for _ in range(RESIZE_ATTEMPTS):
        inode = open_header(connection, name)
        limit = size_limit(inode.block_size_shift, bool(inode.store_policy))
        if size > limit:
            dot = "" if inode.store_policy else "."
            raise Failure(f"New VDI size is too large{dot} This volume's max size is {limit}", USAGE_ERROR)
        if size < inode.vdi_size:
            raise Failure("Shrinking VDIs is not implemented", USAGE_ERROR)
        changed = replace(inode, vdi_size=size).pack()
        try:
            admin.write_object(connection, inode_oid(Vid(inode.vdi_id)), 0, changed)
            return
        except SheepError as error:
            result = error.result
        if result != Result.READONLY:  # else it was frozen since its header was read
            break
    raise Failure(f"Failed to update an inode header: {refusal(result)}")
