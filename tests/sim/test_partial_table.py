"""A cold start while all nodes are away that have the inodes of some volumes: these are out of reach, not missing."""

from __future__ import annotations

import pytest
from tests.sim.test_late_map_writes import create, wait_for
from tests.sim.test_volumes import ask, delete, stored

from sheepdog.cluster.core.errors import NoSpace, Result
from sheepdog.cluster.core.ids import NO_VERSION, Vid, data_oid, inode_oid
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

SIZE = 4 << 20


def found(cluster: SimCluster, name: bytes, node: int) -> tuple[Result, VdiRecord | None]:
    result, record = ask(cluster, lambda one, done: one.operations.find_vdi(name, b"", 0, done), node)
    return Result(result), record


def made(cluster: SimCluster, name: bytes, node: int = 0, base: int = 0, copies: int = 0) -> tuple[Result, Vid]:
    result, record = ask(
        cluster,
        lambda one, done: one.operations.create_vdi(name, SIZE, Vid(base), copies, 0, 0, 20, 0, done),
        node,
    )
    return Result(result), record.vid if record is not None else Vid(0)


def one_starts_alone(copies: int, default: int) -> tuple[SimCluster, int, bytes, Vid]:
    """(cluster, the node that runs, a volume whose inode it does not have, its vid)."""
    cluster = SimCluster(World(5), 3)
    cluster.start_all()
    cluster.format(default)
    vids = {name: made(cluster, name, copies=copies)[1] for name in (b"volume%d" % number for number in range(12))}
    machines = cluster.machines
    alone, name, vid = next(
        (machine, name, vid)
        for machine in machines
        for name, vid in vids.items()
        if inode_oid(vid) not in machine.disk.copies()
    )
    create(cluster, vid, 0)
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    for machine in machines:
        if machine is not alone:
            machine.kill()
    start_alone(cluster, alone)
    return cluster, alone.number, name, vid


def start_alone(cluster: SimCluster, alone: Machine) -> None:
    """The others have ended."""
    cluster.world.run_until(lambda: len(alone.node.cluster.members) == 1, HEALTH_LIMIT_NS, "the others are gone")
    cluster.world.run_for(SECOND)
    alone.kill()
    alone.start()
    cluster.world.run_until(lambda: alone.serves() and alone.node.cluster.loaded, HEALTH_LIMIT_NS, "one runs")


def check(copies: int, default: int) -> None:
    cluster, alone, name, vid = one_starts_alone(copies, default)
    node = cluster.machines[alone].node
    assert found(cluster, name, alone) == (Result.WAIT_FOR_JOIN, None)
    assert found(cluster, b"never made", alone) == (Result.WAIT_FOR_JOIN, None), "nobody can know"
    assert made(cluster, name, alone)[0] == Result.WAIT_FOR_JOIN, "it would take the id of the one that is away"
    (result, _) = wait_for(cluster.world, lambda done: node.gateway.read(data_oid(vid, 0), 0, 4096, done))
    assert result in (Result.SUCCESS, Result.EIO), "that it is not there nobody can say"
    (result, _) = wait_for(cluster.world, lambda done: node.gateway.write(inode_oid(vid), 0, bytes(256), True, done))
    assert result == Result.EIO

    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    result, record = found(cluster, name, alone)
    assert result == Result.SUCCESS
    assert record is not None
    assert (record.vid, record.copies) == (vid, copies or default)
    assert made(cluster, name, alone)[0] == Result.VDI_EXIST
    assert made(cluster, b"never made", alone)[0] == Result.SUCCESS
    assert found(cluster, b"nobody", alone) == (Result.NO_VDI, None)
    (result, _) = wait_for(cluster.world, lambda done: node.gateway.read(data_oid(vid, 0), 0, 4096, done))
    assert result == Result.SUCCESS
    audit(cluster, [data_oid(vid, 0)])


def test_volumes_of_nodes_that_are_away_are_out_of_reach() -> None:
    check(0, 2)


def test_one_with_fewer_copies_than_others_is_missed_too() -> None:
    check(1, 3)


@pytest.mark.parametrize("seed", range(4))
def test_objects_of_a_coded_volume_are_there_before_its_inode_is_found(seed: int) -> None:
    """All nodes are here again, but nobody has told yet how they are kept. (Harder scenario of swarm 125.)"""
    cluster = SimCluster(World(seed), 4)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "coded", 1, (), policy=0x11)
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    alone = next(machine for machine in cluster.machines if inode_oid(volume.vid) not in machine.disk.copies())
    for machine in cluster.machines:
        if machine is not alone:
            machine.kill()
    start_alone(cluster, alone)
    cluster.start_all()
    results: list[int] = []
    while Result.SUCCESS not in results:
        alone.node.gateway.read(data_oid(volume.vid, 0), 0, 4096, lambda result, _: results.append(int(result)))
        cluster.world.run_for(MILLISECOND)
    assert set(results) == {Result.EIO, Result.SUCCESS}


def test_an_administrator_may_give_up_what_is_away() -> None:
    cluster, alone, name, vid = one_starts_alone(0, 2)
    done: list[Result] = []
    cluster.machines[alone].node.operations.force_recover(done.append)
    cluster.world.run_until(lambda: bool(done), HEALTH_LIMIT_NS, "the answer")
    cluster.world.run_for(SECOND)
    assert done == [Result.SUCCESS]
    assert found(cluster, name, alone) == (Result.NO_VDI, None)
    assert made(cluster, name, alone) == (Result.SUCCESS, vid)
    cluster.machines[alone].node.operations.force_recover(done.append)
    assert done[1:] == [Result.FORCE_RECOVER], "there is nothing left to give up"


def test_nothing_is_missed_while_too_few_are_away() -> None:
    """What is not there then does not exist: volumes can be made and deleted."""
    cluster = SimCluster(World(6), 3)
    cluster.start_all()
    cluster.format(2)
    made(cluster, b"one")
    cluster.machines[2].kill()
    cluster.world.run_until(lambda: len(cluster.machines[0].node.cluster.members) == 2, HEALTH_LIMIT_NS, "it is gone")
    cluster.world.run_for(SECOND)
    for machine in cluster.machines[:2]:
        machine.kill()
    for machine in cluster.machines[:2]:
        machine.start()
    node = cluster.machines[0]
    cluster.world.run_until(lambda: node.serves() and node.node.cluster.loaded, HEALTH_LIMIT_NS, "two run")
    assert found(cluster, b"two", 0) == (Result.NO_VDI, None)
    assert made(cluster, b"two")[0] == Result.SUCCESS
    cluster.machines[2].start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    delete(cluster, b"one")
    delete(cluster, b"two")
    assert len(stored(cluster)) == 2, "tombstones only"


def test_an_inode_that_others_may_have_changed_is_not_gone_by() -> None:
    """They froze the volume: who took the old inode for the working one would roll back by the next snapshot."""
    cluster = SimCluster(World(5), 2)
    cluster.start_all()
    cluster.format(2)
    _, vid = made(cluster, b"volume")
    late, other = cluster.machines
    late.kill()
    cluster.world.run_until(lambda: len(other.node.cluster.members) == 1, HEALTH_LIMIT_NS, "it is gone")
    assert (
        ask(cluster, lambda one, done: one.operations.create_vdi(b"volume", SIZE, vid, 0, 0, 0, 20, 1, done), 1)[0] == 0
    )
    goes_on = found(cluster, b"volume", 1)[1]
    other.kill()
    late.start()
    cluster.world.run_for(SECOND)
    other.start()
    cluster.world.run_until(lambda: late.serves() and len(late.node.cluster.members) == 2, HEALTH_LIMIT_NS, "both")
    other.kill()
    cluster.world.run_until(lambda: late.serves() and late.node.cluster.loaded, HEALTH_LIMIT_NS, "one runs")
    assert len(late.node.cluster.members) == 1
    assert found(cluster, b"volume", 0) == (Result.WAIT_FOR_JOIN, None)
    other.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert found(cluster, b"volume", 0) == (Result.SUCCESS, goes_on)
    assert goes_on is not None
    assert goes_on.parent == vid


def test_a_volume_whose_inode_is_bad_here_is_not_missing() -> None:
    """It took no write, for want of space, and could not be made anew before the node with the other copy died."""
    cluster = SimCluster(World(5), 2)
    cluster.start_all()
    cluster.format(2)
    world, name = cluster.world, b"volume"
    vid = made(cluster, name)[1]
    placement = cluster.machines[0].node.context.placement
    home, bad = [cluster.machine(placement.nodes[index]) for index in placement.replicas(inode_oid(vid))]
    world.run_for(SECOND)
    bad.disk.fault, bad.disk.fault_chance = NoSpace, 1.0
    home.node.gateway.write(inode_oid(vid), 0, bytes(256), True, lambda result, _: None)
    world.run_until(lambda: bad.disk.copies()[inode_oid(vid)].version == NO_VERSION, SECOND, "an attempt to restore it")
    home.kill()
    world.run_until(lambda: len(bad.node.cluster.members) == 1, HEALTH_LIMIT_NS, "a death is noticed")
    world.run_for(100 * MILLISECOND)
    bad.kill()
    bad.disk.heal()
    bad.start()
    world.run_until(lambda: bad.serves() and bad.node.cluster.loaded, HEALTH_LIMIT_NS, "one runs")
    assert found(cluster, name, bad.number) == (Result.WAIT_FOR_JOIN, None)
    assert made(cluster, name, bad.number)[0] == Result.WAIT_FOR_JOIN
    home.start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert found(cluster, name, bad.number)[0] == Result.SUCCESS
