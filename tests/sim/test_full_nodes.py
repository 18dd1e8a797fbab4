"""Recovery and nodes that have little space: with format -F what is left there is for clients."""

from __future__ import annotations

from tests.sim.test_directed import fresh, holders, read, settle, write

from sheepdog.cluster.core.errors import NoSpace, Result
from sheepdog.cluster.core.health import findings, report
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, RECOVERY_SKIP_NS
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
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


def test_a_copy_that_could_not_be_cleared_is_made_anew() -> None:
    """What is a hole elsewhere must be one here, too: nothing that a bad copy holds counts."""
    cluster, volume = fresh(3, 2)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    home, oid, answers = holders(cluster, volume)[0], data_oid(volume.vid, 0), []
    home.disk.fault, home.disk.fault_chance = NoSpace, 1.0
    home.node.gateway.zero(oid, 0, BLOCK_SIZE, True, lambda result, _: answers.append(int(result)))
    cluster.world.run_until(lambda: bool(answers), SECOND, "answer")
    home.disk.fault = None
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert answers == [Result.NO_SPACE]
    audit(cluster)
    assert read(cluster.machines[0], volume) == (Result.SUCCESS, bytes(BLOCK_SIZE))


def test_a_home_without_space_for_its_copy_has_others_read() -> None:
    """Whoever waits for the copy would wait until somebody makes room."""
    cluster, volume = fresh(3, 3)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    home = holders(cluster, volume)[0]
    home.kill()
    home.replace_disk()
    home.disk.fault, home.disk.fault_chance = NoSpace, 1.0
    home.start()
    cluster.world.run_until(cluster.all_joined, HEALTH_LIMIT_NS, "the return")
    assert holders(cluster, volume)[0] is home
    for machine in cluster.machines:
        assert read(machine, volume) == (Result.SUCCESS, block_of(1))
    assert write(cluster.machines[0], volume, 2) == Result.NO_SPACE
    home.disk.fault = None
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert write(cluster.machines[0], volume, 2) == Result.SUCCESS
    assert read(home, volume) == (Result.SUCCESS, block_of(2))
    audit(cluster)


def test_a_disk_goes_while_the_home_has_no_space_for_its_copy() -> None:
    """The copy that went with it is made anew all the same, and nothing is left to be done in the end."""
    cluster, volume = fresh(3, 3)
    oid = data_oid(volume.vid, 0)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    home, other, _ = holders(cluster, volume)
    home.kill()
    home.replace_disk()
    home.disk.fault, home.disk.fault_chance = NoSpace, 1.0
    home.start()
    cluster.world.run_until(cluster.all_joined, HEALTH_LIMIT_NS, "the return")
    cluster.world.run_for(SECOND)
    assert oid not in home.disk.copies()
    while other.disk.copies()[oid].size >= 0:
        other.lose_disk()
    cluster.world.run_for(SECOND)
    home.disk.fault = None
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)
    assert read(other, volume) == (Result.SUCCESS, block_of(1))


def test_a_copy_of_nothing_but_holes_needs_room_too() -> None:
    """Where it cannot even be begun, that is known as want of space, and tried again."""
    cluster, volume = fresh(3, 2)
    world, oid = cluster.world, data_oid(volume.vid, 0)
    home, dying = holders(cluster, volume)
    newcomer = next(machine for machine in cluster.machines if machine not in (home, dying))
    answers: list[int] = []
    home.node.gateway.zero(oid, 0, BLOCK_SIZE, True, lambda result, _: answers.append(int(result)))
    world.run_until(lambda: answers == [Result.SUCCESS], SECOND, "answer")
    newcomer.disk.fault, newcomer.disk.fault_chance = NoSpace, 1.0
    dying.kill()
    world.run_until(lambda: len(home.node.cluster.members) == 2, SECOND, "death noticed")
    world.run_for(SECOND)
    assert home.node.copies.at_home().recovery.refusal(oid) == Result.NO_SPACE
    assert oid not in newcomer.disk.copies()
    newcomer.disk.fault = None
    settle(cluster, home, newcomer)
    assert oid in newcomer.disk.copies()


def test_a_full_node_does_not_fill_its_log() -> None:
    """It is tried again five times a second, for as long as nobody makes room."""
    cluster, volume = fresh(3, 2)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    home, dying = holders(cluster, volume)
    newcomer = next(machine for machine in cluster.machines if machine not in (home, dying))
    logged: list[tuple[int, str]] = []
    for machine in (home, newcomer):
        machine.node.context.log = lambda level, text: logged.append((level, text))
    newcomer.disk.fault, newcomer.disk.fault_chance = NoSpace, 1.0
    dying.kill()
    cluster.world.run_for(20 * SECOND)
    tries = [level for level, text in logged if "cannot be restored here" in text]
    assert len(tries) > 50
    assert set(tries) == {7}
    told = [text for level, text in logged if level < 6 and "has no space for it" in text]
    assert 0 < len(told) < 20
