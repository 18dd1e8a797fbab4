"""`dog vdi check` and `dog cluster check`: every copy where it belongs and equal to the others (cli.md 2.6)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Member, NodeId, ObjectId, data_oid, inode_oid, is_data
from sheepdog.cluster.core.ring import Ring
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure, UsageFailure
from sheepdog.tools.dog.output import text, warn
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.strip_check import check_strips
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.vdi_list import headers
from sheepdog.tools.dog.volumes import Opened, name_of, open_volume

EXIST_BATCH = 65_536  # objects asked for in one request: 512 KiB of ids


def volume(context: Context) -> int:
    """One volume or snapshot; with -e only the existence of its copies, status 1 if one is missing."""
    tag, snap_id = snapshot_option(context)
    word = context.argument(0)
    nodes = context.nodes()
    opened = open_volume(context.gateway(), name_of(word), tag, snap_id)
    if context.json and not context.flag("exist"):
        raise UsageFailure("--json shows what -e finds; a check that repairs tells each repair as it is made")
    if context.flag("exist"):
        return _check_existence(context, nodes, opened, word)
    _repair(context, nodes, opened)
    print(f"finish check&repair {word}", flush=True)
    return 0


def cluster(context: Context) -> None:
    """All volumes and snapshots."""
    nodes = context.nodes()
    connection = context.gateway()
    for inode in headers(connection):
        name = os.fsdecode(inode.name)
        if inode.is_snapshot:
            print(f'fix snapshot {name} (id: {inode.snap_id}, tag: "{os.fsdecode(inode.tag)}")', flush=True)
        else:
            print(f"fix vdi {name}", flush=True)
        _repair(context, nodes, Opened(inode, inodes.read_map(connection, inode)))
        print(f"finish check&repair {name}", flush=True)


def _objects(opened: Opened) -> Iterator[ObjectId]:
    """The inode and every data object that it names."""
    yield inode_oid(opened.vid)
    for index, owner in inodes.allocated(opened.entries):
        yield data_oid(owner, index)


# -- contents


def _repair(context: Context, nodes: Sequence[Member], opened: Opened) -> None:
    ring = Ring(nodes)
    policy = policy_of(opened.inode.copy_policy)
    if policy is not None and ring.zones < policy.strips:
        raise Failure("ABORT: Not enough active zones for consistency-checking erasure coded VDI")
    objects = list(_objects(opened))
    size = opened.inode.object_size
    with Progress("check", len(objects) * size) as progress:
        for oid in objects:
            homes = [nodes[index].id for index in ring.replicas(oid, opened.inode.nr_copies)]
            if policy is not None and is_data(oid):
                check_strips(context, oid, homes, policy, size)
            else:
                _repair_object(context, oid, homes)
            progress.advance(size)


def _repair_object(context: Context, oid: ObjectId, homes: list[NodeId]) -> None:
    digests = {home: _digest(context, home, oid) for home in homes}
    counts = Counter(digest for digest in digests.values() if digest)
    if not counts:
        warn(f"no node has {oid:016x}")
        return
    winner, votes = counts.most_common(1)[0]
    if votes * 2 <= counts.total() and len(counts) > 1:
        warn(f"no majority of {oid:016x}")
        return
    source = next(home for home, digest in digests.items() if digest == winner)
    for home, digest in digests.items():
        if digest == winner:
            continue
        try:
            admin.repair_object(context.node(home), oid, source)
        except SheepError as error:
            warn(f"failed to repair {oid:016x} on {home}: {text(error.result)}")
        else:
            print(f"fixed {'replica' if digest else 'missing'} {oid:016x}", flush=True)


def _digest(context: Context, home: NodeId, oid: ObjectId) -> bytes | None:
    try:
        return admin.object_digest(context.node(home), oid, context.epoch)
    except SheepError as error:
        if error.result in (Result.OLD_NODE_VER, Result.NEW_NODE_VER):
            raise Failure("The node list has changed: please try again") from error
        raise Failure(f"failed to read {oid:016x} from {home}: {text(error.result)}") from error


# -- existence


def _check_existence(context: Context, nodes: Sequence[Member], opened: Opened, word: str) -> int:
    lost = _lost(context, nodes, opened)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json({"name": word, "missing": [{"node": str(node), "oid": f"{oid:016x}"} for node, oid in lost]})
        return int(bool(lost))
    for node, oid in lost:
        print(f"[{node}] oid {oid:016x} is missing.")
    if lost:
        print(f"{word} lost {len({oid for _, oid in lost})} object(s).")
        return 1
    print(f"{word} is fine, no object is missing.")
    return 0


def _lost(context: Context, nodes: Sequence[Member], opened: Opened) -> list[tuple[NodeId, ObjectId]]:
    """The nodes that lack a copy that should be there, with the object."""
    ring = Ring(nodes)
    expected: dict[int, list[ObjectId]] = {}
    for oid in _objects(opened):
        for index in ring.replicas(oid, opened.inode.nr_copies):
            expected.setdefault(index, []).append(oid)
    return [
        (nodes[index].id, oid)
        for index in sorted(expected)
        for start in range(0, len(expected[index]), EXIST_BATCH)
        for oid in _missing(context, nodes[index].id, expected[index][start : start + EXIST_BATCH])
    ]


def _missing(context: Context, node: NodeId, oids: list[ObjectId]) -> list[ObjectId]:
    """Those that the node does not hold; all of them if it does not answer."""
    try:
        return admin.missing_objects(context.node(node), oids)
    except Unreachable:
        return oids
    except SheepError as error:
        raise Failure(f"{node}: {text(error.result)}") from error
