"""A client that makes many objects at once writes as many entries of its map: they become few writes of the inode."""

from __future__ import annotations

from typing import Any

import pytest
from tests.sim.test_late_map_writes import OBJECTS, create, new_vdi, read_map, running, wait_for, write_map

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import VERSION_STEP_BITS, ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import SECOND


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


def test_names_that_have_waited_wait_for_a_snapshot_that_came_meanwhile() -> None:
    """It waits for those that were under way when it came, and copies the inode as these leave it."""
    cluster = running(9)
    vid = new_vdi(cluster)
    gateway, entry = cluster.machines[1].node.gateway, vid.to_bytes(4, "little")
    answers, drained = list[int](), list[None]()
    for index in (0, 1):
        gateway.write(inode_oid(vid), map_offset(index), entry, True, lambda result, _: answers.append(int(result)))
    gateway.freeze(vid, ("test", 1), lambda: drained.append(None))
    cluster.world.run_until(lambda: bool(drained), HEALTH_LIMIT_NS, "the freeze")
    cluster.world.run_for(SECOND)
    assert answers == [Result.SUCCESS]
    assert read_map(cluster, vid)[:2] == [vid, 0]
    gateway.thaw(("test", 1))
    cluster.world.run_until(lambda: len(answers) == 2, HEALTH_LIMIT_NS, "the second name")
    assert read_map(cluster, vid)[:2] == [vid, vid]


def exists(cluster: SimCluster, oid: ObjectId) -> bool:
    result, _ = wait_for(cluster.world, lambda done: cluster.machines[0].node.gateway.raw_read(oid, 0, 1, done))
    assert result in (Result.SUCCESS, Result.NO_OBJ)
    return bool(result == Result.SUCCESS)


def reads_of(cluster: SimCluster, vid: Vid, index: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the gateway reads an inode while it names an object of the volume's own in it."""
    gateway, read = cluster.machines[1].node.gateway, list[ObjectId]()
    raw_read = gateway.raw_read

    def counted(oid: ObjectId, *rest: Any) -> None:
        read.append(oid)
        raw_read(oid, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gateway, "raw_read", counted)
        write_map(cluster, vid, index, vid, by=1)
    return read.count(inode_oid(vid))


def test_what_a_name_replaces_is_asked_for_where_it_may_be_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a volume that was branched off nothing it is nobody's; else it may become free."""
    cluster = running(8)
    first = new_vdi(cluster)
    create(cluster, first, 0, 1)
    assert reads_of(cluster, first, 0, monkeypatch) == 0
    write_map(cluster, first, 1, first)
    second = new_vdi(cluster, first, snapshot=True)
    write_map(cluster, first, 1, 0)  # now only `second` names it
    assert read_map(cluster, second)[:2] == [first, first]
    create(cluster, second, 0, 1)
    assert reads_of(cluster, second, 0, monkeypatch) > 0
    assert reads_of(cluster, second, 1, monkeypatch) > 0
    assert exists(cluster, data_oid(first, 0))
    assert not exists(cluster, data_oid(first, 1))
