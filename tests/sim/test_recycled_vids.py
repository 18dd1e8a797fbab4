"""`format -R`: vids are given from 1 on, and free again when all of a family is deleted; safely."""

from __future__ import annotations

import pytest
from tests.sim.test_late_map_writes import create, wait_for, write_map
from tests.sim.test_partial_table import found, made
from tests.sim.test_reclaim import delete_everything
from tests.sim.test_volumes import delete, stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.audit import audit, audit_all_but_leaks
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

FLAGS = ClusterFlag.AUTO_VNODES | ClusterFlag.RECYCLE
FAULTS = {
    "kills": Faults(kill=2, link=0.5, mean_ns=80 * MILLISECOND),
    "full stops": Faults(kill=1, everybody=0.4, mean_ns=200 * MILLISECOND),
}
SEEDS = {"kills": (*range(9), 16, 17, 22, 26, 28), "full stops": range(6)}  # the later ones found something once


def recycling(copies: int = 3) -> SimCluster:
    cluster = SimCluster(World(3), 4)
    cluster.start_all()
    cluster.format(copies, FLAGS)
    return cluster


def snapshot(cluster: SimCluster, name: bytes, vid: Vid) -> Vid:
    node = cluster.machines[0].node
    result, record = wait_for(
        cluster.world, lambda done: node.operations.create_vdi(name, 4 << 20, vid, 0, 0, 0, 20, 1, done)
    )
    assert result == Result.SUCCESS
    new: Vid = record.vid
    return new


def test_vids_are_given_from_one_on_and_again() -> None:
    cluster = recycling()
    assert [made(cluster, name)[1] for name in (b"a", b"b", b"c")] == [1, 2, 3]
    delete(cluster, b"b")
    assert stored(cluster) == [inode_oid(Vid(1)), inode_oid(Vid(3))]
    assert made(cluster, b"d") == (Result.SUCCESS, 2)
    audit(cluster)


def test_a_family_keeps_its_vids_and_its_name() -> None:
    cluster = recycling()
    first = made(cluster, b"a")[1]
    second = snapshot(cluster, b"a", first)
    _, clone = made(cluster, b"clone", base=first)
    delete(cluster, b"a")
    assert made(cluster, b"a")[0] == Result.VDI_EXIST, "its snapshot is left"
    delete(cluster, b"a", snap_id=1)
    assert {inode_oid(vid) for vid in (first, second, clone)} <= set(stored(cluster)), "the clone is of that family"
    assert made(cluster, b"b")[1] == 4
    delete(cluster, b"clone")
    assert stored(cluster) == [inode_oid(Vid(4))]
    assert made(cluster, b"a") == (Result.SUCCESS, 1)


def test_what_a_node_brings_back_is_not_taken_for_the_new_volume() -> None:
    """It was away when the old one of that vid was deleted."""
    cluster = recycling()
    _, vid = made(cluster, b"old")
    create(cluster, vid, 0, 1)
    write_map(cluster, vid, 0, vid, vid)
    away = next(machine for machine in cluster.machines if data_oid(vid, 1) in machine.disk.copies())
    away.kill()
    cluster.world.run_for(SECOND)
    node = next(machine.number for machine in cluster.machines if machine is not away)
    gone = wait_for(cluster.world, lambda done: cluster.machines[node].node.operations.delete_vdi(b"old", b"", 0, done))
    assert gone[0] == Result.SUCCESS
    cluster.world.run_until(
        lambda: cluster.machines[node].node.cluster.vdis.get(vid) is None, HEALTH_LIMIT_NS, "the vid is free"
    )
    assert made(cluster, b"new", node) == (Result.SUCCESS, vid)
    away.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert stored(cluster) == [inode_oid(vid)]
    assert found(cluster, b"old", node) == (Result.NO_VDI, None)
    audit(cluster)


@pytest.mark.parametrize("faults", list(FAULTS))
def test_nothing_at_all_is_left_of_what_is_deleted(faults: str) -> None:
    for seed in SEEDS[faults]:
        scenario = Scenario(
            f"recycling {faults}", clients=0, owners=3, objects=3, faults=FAULTS[faults], durable_chance=1.0
        )
        scenario.flags = FLAGS
        run = Run(scenario, seed)
        run.execute()
        audit_all_but_leaks(run.cluster)
        delete_everything(run.cluster)
        assert stored(run.cluster) == [], f"seed {seed}"
        assert not list(run.cluster.machines[0].node.cluster.vdis.records())
