"""Recovery and nodes that have little space: with format -F what is left there is for clients."""

from __future__ import annotations

from tests.sim.test_directed import holders, read, write

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.health import findings, report
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import RECOVERY_SKIP_NS
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

OBJECTS = 24


def nearly_full(flags: int) -> tuple[SimCluster, Volume, list[Machine], Machine]:
    """Two copies on three nodes, of which one dies: the volume, the nodes that stay, the node that object 0 lacks."""
    cluster = SimCluster(World(1), 3)
    cluster.start_all()
    cluster.format(2, ClusterFlag.AUTO_VNODES | flags)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    dying = holders(cluster, volume)[1]
    staying = [machine for machine in cluster.machines if machine is not dying]
    lacking = next(machine for machine in staying if data_oid(volume.vid, 0) not in machine.disk.copies())
    for machine in staying:
        machine.disk.capacity_bytes = machine.node.context.store.usage()[0] + (1 << 20)
    dying.kill()
    cluster.world.run_until(lambda: len(staying[0].node.cluster.members) == 2, SECOND, "death noticed")
    cluster.world.run_for(2 * SECOND)
    return cluster, volume, staying, lacking


def skipped(machines: list[Machine]) -> int:
    return sum(machine.node.home.recovery.skipped() for machine in machines if machine.node.home is not None)


def test_recovery_leaves_space_to_clients() -> None:
    cluster, volume, staying, lacking = nearly_full(ClusterFlag.AVOID_DISKFULL)
    oid, waiting = data_oid(volume.vid, 0), skipped(staying)
    assert waiting > 2
    assert oid not in lacking.disk.copies()
    assert read(staying[0], volume) == (Result.SUCCESS, block_of(1))
    reports = {machine.id: report(machine.node, [], 0) for machine in staying}
    assert any("does not fill disks" in one.text for one in findings(staying[0].node.cluster.members, reports))
    assert write(lacking, volume, 2) == Result.SUCCESS, "what clients need is restored"
    assert oid in lacking.disk.copies()
    assert skipped(staying) == waiting - 1
    for machine in staying:
        machine.disk.capacity_bytes = 1 << 40
    cluster.world.run_for(2 * RECOVERY_SKIP_NS)
    assert not skipped(staying)
    assert all(data_oid(volume.vid, index) in lacking.disk.copies() for index in range(OBJECTS))


def test_without_it_there_is_no_such_limit() -> None:
    _, volume, staying, lacking = nearly_full(0)
    assert not skipped(staying)
    assert all(data_oid(volume.vid, index) in lacking.disk.copies() for index in range(OBJECTS))
