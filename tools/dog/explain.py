"""`dog vdi object explain`: which object holds a byte of a volume, why it is where it is, and who holds what."""

from __future__ import annotations

import os
from typing import Any

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.hashing import object_hash
from sheepdog.cluster.core.ids import VERSION_STEP_BITS, Member, NodeId, ObjectId, data_oid
from sheepdog.cluster.core.ring import Ring
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import human_size, parse_size, redundancy
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.volumes import Opened, name_of, open_volume

Details = dict[NodeId, dict[str, Any] | None]


def explain(context: Context) -> None:
    """OFFSET is in bytes, or with a suffix as sizes are given."""
    nodes = context.nodes()
    tag, snap_id = snapshot_option(context)
    volume = open_volume(context.gateway(), name_of(context.argument(0)), tag, snap_id)
    offset = parse_size(context.argument(1, "please specify an offset"))
    if offset >= volume.inode.vdi_size:
        raise Failure("The offset is too large!")
    index, inside = divmod(offset, volume.inode.object_size)
    owner = volume.owner(index)
    oid = data_oid(owner, index) if owner else None
    details = _ask_all(context, nodes, oid) if oid is not None else {}
    if context.json:
        _print_json(nodes, volume, offset, oid, details)
        return
    name = os.fsdecode(volume.inode.name)
    print(f"{name}, byte {offset}: object {index} of {human_size(volume.inode.object_size)}, byte {inside} in it")
    if oid is None:
        print("Nothing was ever written there: no object, reads give zeros")
        return
    shared = "" if owner == volume.vid else f", made by vid {owner:x} and shared with it"
    copies = redundancy(volume.inode.nr_copies, volume.inode.copy_policy)
    print(f"Object {oid:016x} of vid {volume.vid:x}{shared}; redundancy {copies}")
    _print_ring(nodes, volume, oid)
    _print_holders(nodes, volume, oid, details)


def _ask_all(context: Context, nodes: list[Member], oid: ObjectId) -> Details:
    found: Details = {}
    for node in nodes:
        try:
            found[node.id] = admin.object_details(context.node(node.id), oid, context.epoch)
        except (OSError, SheepError, PeerError, Unreachable):
            found[node.id] = None
    return found


def _print_ring(nodes: list[Member], volume: Opened, oid: ObjectId) -> None:
    print(f"\nOn the ring at {object_hash(oid):016x}; from there on:")
    print("  Point              Node                    Zone")
    holders: list[int] = []
    for point, index, taken in Ring(nodes).walk(oid, volume.inode.nr_copies):
        node = nodes[index]
        if taken:
            what = "strip" if volume.inode.copy_policy else "copy"
            why = f"{what} {len(holders)}" + ("; home: orders the writes" if not holders else "")
            holders.append(index)
        else:
            why = "has one already" if index in holders else "its zone has one already"
        print(f"  {point:016x}   {node.id!s:<21}{node.zone:7d}   {why}")
    if len(holders) < volume.inode.nr_copies:
        print(f"  and no more: there are only {len(holders)} zones")


def _version(values: list[int]) -> str:
    """epoch.term.write; a write that power failure cut has a further number."""
    epoch, term, counter = values
    if not (epoch or term or counter):
        return "unfinished"
    cut = counter & ((1 << VERSION_STEP_BITS) - 1)
    return f"{epoch}.{term}.{counter >> VERSION_STEP_BITS}" + (f"+{cut}" if cut else "")


def _print_holders(nodes: list[Member], volume: Opened, oid: ObjectId, details: Details) -> None:
    wanted = [nodes[index].id for index in Ring(nodes).replicas(oid, volume.inode.nr_copies)]
    state = next((one["state"] for one in details.values() if one and one["state"]), "unknown")
    print(f"\nHeld by (version: epoch.start.write); the home says: {state}")
    for node in nodes:
        found = details[node.id]
        if found is None:
            print(f"  {node.id!s:<21}does not answer")
            continue
        for copy in found["copies"]:
            strip = f"strip {copy['strip']}, " if copy["strip"] >= 0 else ""
            current = "current" if copy["current"] else "not current"
            surplus = "" if node.id in wanted else "; does not belong here any more"
            print(
                f"  {node.id!s:<21}{strip}version {_version(copy['version'])}, {copy['size']} bytes, {current}{surplus}"
            )
        if not found["copies"] and node.id in wanted:
            print(f"  {node.id!s:<21}nothing yet")


def _print_json(nodes: list[Member], volume: Opened, offset: int, oid: ObjectId | None, details: Details) -> None:
    from sheepdog.tools.dog.records import print_json

    index, inside = divmod(offset, volume.inode.object_size)
    value: dict[str, Any] = {
        "vdi_id": f"{volume.vid:x}",
        "index": index,
        "offset_in_object": inside,
        "oid": f"{oid:016x}" if oid is not None else None,
        "redundancy": redundancy(volume.inode.nr_copies, volume.inode.copy_policy),
    }
    if oid is not None:
        walk = Ring(nodes).walk(oid, volume.inode.nr_copies)
        value |= {
            "hash": f"{object_hash(oid):016x}",
            "ring": [
                {"point": f"{point:016x}", "node": str(nodes[at].id), "zone": nodes[at].zone, "chosen": chosen}
                for point, at, chosen in walk
            ],
            "state": next((one["state"] for one in details.values() if one and one["state"]), "unknown"),
            "held": {str(node): found["copies"] if found is not None else None for node, found in details.items()},
        }
    print_json(value)
