"""`dog vdi object location|map|dump-inode` and `dog vdi track` (cli.md 2.6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from struct import Struct

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.ids import Member, NodeId, ObjectId, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_END, InodeHeader, unpack_map
from sheepdog.cluster.core.limits import INODE_SIZE, MAX_MAP_ENTRIES
from sheepdog.cluster.core.ring import Ring
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import text, warn
from sheepdog.tools.dog.values import parse_index, parse_oid, snapshot_option
from sheepdog.tools.dog.volumes import Opened, name_of, open_volume

_REFERENCE = Struct("<ii")  # generation, count
MAX_HYPER_ENTRIES = 1 << 32


def placement(nodes: Sequence[Member], oid: ObjectId, copies: int) -> list[NodeId]:
    """Where an object belongs: in as many zones as there are copies, or in all of them."""
    return [nodes[index].id for index in Ring(nodes).replicas(oid, copies)]


def _open(context: Context) -> Opened:
    tag, snap_id = snapshot_option(context)
    word = context.argument(0)
    try:
        return open_volume(context.gateway(), name_of(word), tag, snap_id)
    except Unreachable:
        raise
    except Failure as failure:
        raise Failure(f"{failure.text}\nFATAL: {word} not found", failure.code) from failure


def _index(context: Context, inode: InodeHeader) -> int:
    """Beyond the volume's end there is nothing allocated; beyond the largest map there is no such index."""
    index = parse_index(context.value("index"))
    if index >= (MAX_HYPER_ENTRIES if inode.store_policy else MAX_MAP_ENTRIES):
        print("The offset is too large!", flush=True)
        raise Failure()
    return index


def location(context: Context) -> None:
    """Which nodes hold an object, and which should."""
    nodes = context.nodes()
    volume = _open(context)
    copies = volume.inode.nr_copies
    if context.json:
        _location_json(context, nodes, volume)
        return
    if not context.flag("index"):
        oid = inode_oid(volume.vid)
        print(f"Looking for the inode object 0x{volume.vid:x} with {len(nodes)} nodes\n")
    else:
        index = _index(context, volume.inode)
        owner = volume.owner(index)
        if not owner:
            print(f"The inode object 0x{volume.vid:x} idx {index} is not allocated")
            return
        oid = data_oid(owner, index)
        where = f"(vid 0x{volume.vid:x} idx {index}, {copies} copies)"
        print(f"Looking for the object {oid:016x} {where} with {len(nodes)} nodes\n")
    for node in nodes:
        has = _has(context, node, oid)
        if has is not None:
            print(node.id, "has the object" if has else "doesn't have the object", flush=True)
    print()
    storing = [node for node in nodes if node.vnodes]
    if len(storing) < copies:
        print(
            f"Because number of nodes ({len(storing)}) is less than number of copies ({copies}), "
            "the object should be located at every nodes."
        )
        return
    print("According to sheepdog algorithm, the object should be located at:")
    print(" ".join(str(node) for node in placement(nodes, oid, copies)))


def _object_of(context: Context, volume: Opened) -> ObjectId | None:
    """The data object that -i names, or the inode; None for a hole."""
    if not context.flag("index"):
        return inode_oid(volume.vid)
    index = _index(context, volume.inode)
    owner = volume.owner(index)
    return data_oid(owner, index) if owner else None


def _location_json(context: Context, nodes: Sequence[Member], volume: Opened) -> None:
    from sheepdog.tools.dog.records import print_json

    oid = _object_of(context, volume)
    if oid is None:
        print_json({"oid": None, "holders": [], "expected": []})
        return
    holders = [str(node.id) for node in nodes if _has(context, node, oid)]
    expected = [str(node) for node in placement(nodes, oid, volume.inode.nr_copies)]
    print_json({"oid": f"{oid:016x}", "holders": holders, "expected": expected})


def _has(context: Context, node: Member, oid: ObjectId) -> bool | None:
    """Whether a node holds an object; None, and why on stderr, if it does not say."""
    try:
        return admin.object_exists(context.node(node.id), oid, context.epoch)
    except SheepError as error:
        if error.result in (Result.OLD_NODE_VER, Result.NEW_NODE_VER):
            warn("The node list has changed: please try again")
        else:
            warn(f"{node.id}: {text(error.result)}")
    except OSError as error:
        warn(f"Failed to connect to {node.id}: {error.strerror or error}")
    return None


def object_map(context: Context) -> None:
    """The allocated entries of a volume's map, or one entry."""
    volume = _open(context)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        indexes = range(_index(context, volume.inode), 1 << 32)[:1] if context.flag("index") else None
        entries = [(index, volume.owner(index)) for index in indexes] if indexes else inodes.allocated(volume.entries)
        print_json([{"index": index, "vdi_id": f"{owner:x}"} for index, owner in entries])
        return
    print("Index       VID")
    if context.flag("index"):
        index = _index(context, volume.inode)
        print(f"{index:08d} {volume.owner(index):8x}")
        return
    for index, owner in inodes.allocated(volume.entries):
        print(f"{index:08d} {owner:8x}")


def track(context: Context) -> None:
    """Where an object belonged in each epoch, newest first."""
    nodes = context.nodes()
    volume = _open(context)
    copies = volume.inode.nr_copies
    if context.json:
        _track_json(context, nodes, volume)
        return
    if context.flag("oid"):
        oid = parse_oid(context.value("oid"))
        print(f"Tracking the object {oid:016x} (the inode vid 0x{volume.vid:x}) with {len(nodes)} nodes")
    elif context.flag("index"):
        index = _index(context, volume.inode)
        owner = volume.owner(index)
        if not owner:
            print(f"The inode object 0x{volume.vid:x} idx {index} is not allocated")
            return
        oid = data_oid(owner, index)
        where = f"(the inode vid 0x{volume.vid:x} idx {index})"
        print(f"Tracking the object {oid:016x} {where} with {len(nodes)} nodes")
    else:
        oid = inode_oid(volume.vid)
        print(f"Tracking the inode object 0x{volume.vid:x} with {len(nodes)} nodes")
    log = admin.epoch_log(context.gateway(), len(nodes), context.epoch)
    for epoch, members in log.records:
        title = f"obj {oid:016x} locations at epoch {epoch.epoch}, copies = {copies}"
        print(f"\n{title}\n{'-' * 51}")
        for node in placement(members, oid, copies):
            print(node)


def _track_json(context: Context, nodes: Sequence[Member], volume: Opened) -> None:
    from sheepdog.tools.dog.records import print_json

    oid = parse_oid(context.value("oid")) if context.flag("oid") else _object_of(context, volume)
    if oid is None:
        print_json([])
        return
    records = admin.epoch_log(context.gateway(), len(nodes), context.epoch).records
    places = [(epoch.epoch, placement(members, oid, volume.inode.nr_copies)) for epoch, members in records]
    print_json(
        [{"epoch": epoch, "oid": f"{oid:016x}", "nodes": [str(node) for node in found]} for epoch, found in places]
    )


def dump_inode(context: Context) -> None:
    """Decodes the file of an inode object, as it lies in a store."""
    path = context.argument(0)
    try:
        data = Path(path).read_bytes()
        inode = InodeHeader.unpack(data)
    except OSError as error:
        raise Failure(f"Failed to read {path}: {error.strerror}", 2) from error
    except PeerError as error:
        raise Failure(f"{path} is not an inode object: {error}", 2) from error
    entries = unpack_map(data[HEADER_SIZE:MAP_END]) if not inode.store_policy else None
    owners = [(index, vid) for index, vid in enumerate(entries or ()) if vid]
    table = data[MAP_END:INODE_SIZE]
    counts = enumerate(_REFERENCE.iter_unpack(table[: len(table) // _REFERENCE.size * _REFERENCE.size]))
    references = [(index, entries[index], *count) for index, count in counts if any(count) and entries]
    if context.json:
        _print_inode_json(inode, owners, references)
        return
    print(f"name: {os.fsdecode(inode.name)}\ntag: {os.fsdecode(inode.tag)}")
    print(f"create_time: {inode.create_time:x}\nsnap_ctime: {inode.snap_ctime:x}")
    print(f"vm_clock_nsec: {inode.vm_clock_nsec:x}\nvdi_size: {inode.vdi_size}\nvm_state_size: {inode.vm_state_size}")
    print(f"copy_policy: {inode.copy_policy}\nstore_policy: {inode.store_policy}\nnr_copies: {inode.nr_copies}")
    print(f"block_size_shift: {inode.block_size_shift}\nsnap_id: {inode.snap_id}\nvdi_id: {inode.vdi_id:x}")
    print(f"parent_vdi_id: {inode.parent_vdi_id:x}\nbtree_counter: {inode.btree_counter}")
    print("data_vdi_id:")
    for index, vid in owners:
        print(f"{index}: {vid:x}")
    print("gref:")
    for index, vid, generation, count in references:
        print(f"{index}: {vid:x}, {generation}, {count}")


def _print_inode_json(
    inode: InodeHeader, owners: list[tuple[int, int]], references: list[tuple[int, int, int, int]]
) -> None:
    from sheepdog.tools.dog.records import print_json

    names: tuple[str, ...] = (
        "create_time",
        "snap_ctime",
        "vm_clock_nsec",
        "vdi_size",
        "vm_state_size",
        "copy_policy",
        "store_policy",
    )
    names += ("nr_copies", "block_size_shift", "snap_id", "btree_counter")
    print_json(
        {
            "name": os.fsdecode(inode.name),
            "tag": os.fsdecode(inode.tag),
            "vdi_id": f"{inode.vdi_id:x}",
            "parent": f"{inode.parent_vdi_id:x}",
            **{name: getattr(inode, name) for name in names},
            "objects": [{"index": index, "vdi_id": f"{vid:x}"} for index, vid in owners],
            "references": [
                {"index": index, "vdi_id": f"{vid:x}", "generation": generation, "count": count}
                for index, vid, generation, count in references
            ],
        }
    )
