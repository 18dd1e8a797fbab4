"""A client that makes many objects at once writes as many entries of its map: they become few writes of the inode."""

from __future__ import annotations

from typing import Any

from tests.sim.test_late_map_writes import OBJECTS, create, new_vdi, read_map, running, write_map

from sheepdog.cluster.core.ids import VERSION_STEP_BITS, ObjectId, inode_oid
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster


def last_write(cluster: SimCluster, oid: ObjectId) -> int:
    """Its number, which the home counts; all copies have it."""
    versions = {machine.node.context.store.version(oid) for machine in cluster.machines}
    assert len(versions) == 1
    version = versions.pop()
    assert version is not None
    return version.counter >> VERSION_STEP_BITS


def test_entries_that_are_written_at_once() -> None:
    cluster = running(7)
    vid = new_vdi(cluster)
    create(cluster, vid, *range(OBJECTS))
    oid, gateway = inode_oid(vid), cluster.machines[1].node.gateway
    write_map(cluster, vid, 0, vid)
    before = last_write(cluster, oid)
    answers: list[Any] = []
    for index in (1, 4, 0, 2, 3):
        entry = vid.to_bytes(4, "little")
        gateway.write(oid, map_offset(index), entry, index == 3, lambda *answer: answers.append(answer))
    cluster.world.run_until(lambda: len(answers) == OBJECTS, HEALTH_LIMIT_NS, "all entries")
    assert [result for result, _ in answers] == [0] * OBJECTS
    assert read_map(cluster, vid) == [vid] * OBJECTS
    assert last_write(cluster, oid) - before == 3  # of entry 1; then of 0, and of 2 to 4
