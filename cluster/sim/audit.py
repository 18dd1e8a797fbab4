"""What must be true of the disks of a healthy cluster: copies equal, exactly where they belong, nothing orphaned."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence

from sheepdog.cluster.core.ids import (
    NO_VERSION,
    STRIP_SHIFT,
    NodeId,
    ObjectId,
    Vid,
    data_oid,
    index_of,
    inode_oid,
    is_data,
    is_inode,
    plain_oid,
    vid_of,
)
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_OFFSET, InodeHeader, unpack_map
from sheepdog.cluster.sim.cluster import SimCluster
from sheepdog.cluster.sim.copy import Copy
from sheepdog.cluster.sim.history import Violation
from sheepdog.cluster.sim.strip_audit import strips_fit


def audit(cluster: SimCluster, doubtful: Container[ObjectId] = ()) -> None:
    """Violation if the disks are not as the cluster says; the cluster must be healthy.

    `doubtful`: objects that a client may have created without ever naming them.
    """
    leaked = audit_all_but_leaks(cluster)
    for oid in leaked:
        if oid not in doubtful:
            raise Violation(f"object {oid:016x} (index {index_of(oid)}) is named by no inode")


def audit_all_but_leaks(cluster: SimCluster) -> list[ObjectId]:
    """The same, but data objects that no inode names are only listed.

    A gateway that dies between an entry of a map and the objects that the old entry named leaves them behind.
    """
    copies_equal(cluster)
    strips_fit(cluster)
    tables_equal(cluster)
    return unnamed(cluster)


def copies_equal(cluster: SimCluster) -> None:
    """Every object is on exactly the nodes of its placement, with one version and equal bytes."""
    machines = cluster.machines
    held = {machine.id: machine.disk.copies() for machine in machines}
    placement = machines[0].node.context.placement
    for oid in sorted({oid for copies in held.values() for oid in copies if not oid >> STRIP_SHIFT}):
        holders = [node for node in placement.nodes if oid in held[node]]
        wanted = sorted(placement.nodes[index] for index in placement.replicas(oid))
        if holders != wanted:
            raise Violation(f"object {oid:016x} is on {_names(holders)}, belongs on {_names(wanted)}")
        first = held[holders[0]][oid]
        if first.version == NO_VERSION:
            raise Violation(f"object {oid:016x} has no version on {holders[0]}")
        for node in holders[1:]:
            _compare(oid, first, held[node][oid], f"{holders[0]} and {node}")


def _names(nodes: Sequence[NodeId]) -> str:
    return ", ".join(str(node) for node in nodes) or "no node"


def _compare(oid: ObjectId, one: Copy, other: Copy, where: str) -> None:
    if one.version != other.version:
        raise Violation(f"object {oid:016x} on {where}: versions {tuple(one.version)} and {tuple(other.version)}")
    if one.size != other.size:
        raise Violation(f"object {oid:016x} on {where}: {one.size} and {other.size} bytes")
    if one.rotten or other.rotten:
        raise Violation(f"object {oid:016x} on {where}: rotten blocks {list(one.rotten)}, {list(other.rotten)}")
    if one.blocks != other.blocks:
        numbers = sorted({*one.blocks, *other.blocks})
        differing = [number for number in numbers if one.blocks.get(number) != other.blocks.get(number)]
        raise Violation(f"object {oid:016x} on {where}: equal versions, blocks {differing[:8]} differ")


def tables_equal(cluster: SimCluster) -> None:
    """All nodes agree on the replicated state."""
    states = [(machine.name, machine.node.cluster.encode()) for machine in cluster.machines]
    for name, state in states[1:]:
        if state != states[0][1]:
            raise Violation(f"{name} and {states[0][0]} have different cluster states")


def unnamed(cluster: SimCluster) -> list[ObjectId]:
    """Data objects that no inode names. Every entry of a map must name an object, every inode be in the table."""
    copies: dict[ObjectId, Copy] = {}
    for machine in cluster.machines:
        copies.update((plain_oid(oid), copy) for oid, copy in machine.disk.copies().items())
    vdis = cluster.machines[0].node.cluster.vdis
    named: dict[ObjectId, Vid] = {}
    for oid, copy in sorted(copies.items()):
        if not is_inode(oid):
            continue
        record = vdis.get(vid_of(oid))
        header = InodeHeader.unpack(copy.read(0, HEADER_SIZE))
        if record is None:
            raise Violation(f"inode {oid:016x} ({header.name!r}) is not in the table of volumes")
        if (record.name, bool(record.snap_ctime)) != (header.name, bool(header.snap_ctime)):
            raise Violation(f"inode {oid:016x} says {header.name!r}, {header.snap_ctime}, the table {record}")
        entries: array[int] = (
            unpack_map(copy.read(MAP_OFFSET, 4 * header.object_count)) if header.vdi_size else array("I")
        )
        for index, owner in enumerate(entries):
            if owner:
                named.setdefault(data_oid(Vid(owner), index), vid_of(oid))
    for oid in sorted(copies):
        if is_data(oid) and oid not in named and ((record := vdis.get(vid_of(oid))) is None or record.deleted):
            raise Violation(f"object {oid:016x} belonged to a deleted volume, and nothing names it")
    for record in vdis.records():
        if inode_oid(record.vid) not in copies:
            raise Violation(f"volume {record.name!r} {record.vid:x} has no inode object")
    for oid, vid in sorted(named.items()):
        if oid not in copies:
            raise Violation(f"object {oid:016x} is named by the map of {vid:x} and does not exist")
    return [oid for oid in sorted(copies) if is_data(oid) and oid not in named]
