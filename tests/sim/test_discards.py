"""Objects that a client gives back, and then power fails everywhere."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, read, write
from tests.sim.test_late_map_writes import create, new_vdi, read_map, running, write_map
from tests.sim.test_volumes import ask, delete, stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VID, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS
from sheepdog.cluster.sim.world import SECOND


@pytest.mark.parametrize("seed", range(12))
def test_what_was_removed_is_not_named_again(seed: int) -> None:
    """Nobody asked for the map to be durable, but the object is gone."""
    cluster, volume = fresh(3, 2, seed)
    door = cluster.machines[0]
    assert write(door, volume, 1, durable=True) == Result.SUCCESS
    results: list[int] = []
    place, nothing = map_offset(0), NO_VID.to_bytes(4, "little")
    door.node.gateway.write(inode_oid(volume.vid), place, nothing, False, lambda result, _: results.append(result))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.SUCCESS]
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    named: list[Buffer] = []
    door.node.gateway.read(inode_oid(volume.vid), place, 4, lambda _, data: named.append(bytes(data)))
    cluster.world.run_until(lambda: bool(named), SECOND, "the map")
    assert named == [nothing] or read(door, volume)[0] == Result.SUCCESS


@pytest.mark.parametrize("seed", range(24))
def test_what_a_clone_has_copied_goes_when_the_clone_names_its_own(seed: int) -> None:
    """Nobody else names it any more. Nor did anybody ask for the clone's map to be durable."""
    cluster = running(seed)
    vid = new_vdi(cluster)
    create(cluster, vid, 0)
    cluster.world.run_for(SECOND)  # all nodes know the volume, and below what has been deleted
    write_map(cluster, vid, 0, vid)
    new_vdi(cluster, vid, snapshot=True)
    clone = new_vdi(cluster, vid, name=b"clone")
    delete(cluster, b"guest")
    delete(cluster, b"guest", 1)
    create(cluster, clone, 0)
    cluster.world.run_for(SECOND)
    result, _ = ask(
        cluster,
        lambda node, done: node.gateway.write(
            inode_oid(clone), map_offset(0), clone.to_bytes(4, "little"), False, done
        ),
    )
    assert result == Result.SUCCESS
    cluster.world.run_for(SECOND // 10)  # by then it is gone, or left to a sweep
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    (owner, *_) = read_map(cluster, clone)
    assert data_oid(Vid(owner), 0) in stored(cluster)
