"""A node that leaves is given time to come back before the others take over what it held (format --recovery-delay)."""

from __future__ import annotations

from tests.sim.test_directed import holders, read, write

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

DELAY_S = 10
OBJECTS = 12


def fresh(machines: int, copies: int) -> tuple[SimCluster, Volume]:
    cluster = SimCluster(World(3), machines)
    cluster.start_all()
    cluster.format(copies, recovery_delay_s=DELAY_S)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    return cluster, volume


def copies_of(cluster: SimCluster, volume: Volume, index: int) -> list[Machine]:
    """Machines that are up and have object `index`."""
    oid = data_oid(volume.vid, index)
    return [machine for machine in cluster.machines if machine.up and machine.node.context.store.version(oid)]


def victim_of(cluster: SimCluster, volume: Volume) -> tuple[Machine, list[int]]:
    """A holder of object 0, not its home, and which objects it holds."""
    victim = holders(cluster, volume)[-1]
    return victim, [index for index in range(OBJECTS) if victim in copies_of(cluster, volume, index)]


def moved(cluster: SimCluster) -> int:
    return sum(machine.node.copies.puller.bytes_pulled for machine in cluster.machines if machine.up)


def test_nothing_moves_before_its_time_and_nothing_waits() -> None:
    cluster, volume = fresh(5, 3)
    victim, held = victim_of(cluster, volume)
    survivor = holders(cluster, volume)[0]
    assert write(survivor, volume, 1) == Result.SUCCESS
    victim.kill()
    cluster.world.run_for((DELAY_S - 2) * SECOND)
    assert [len(copies_of(cluster, volume, index)) for index in held] == [2] * len(held), "nothing was copied"
    assert moved(cluster) == 0
    home = survivor.node.home
    assert home is not None
    waits_s = home.recovery.waits_ns() / SECOND
    assert 0 < waits_s <= 3
    assert survivor.node.recovery_progress()[0], "there is something to recover"
    assert read(survivor, volume) == (Result.SUCCESS, block_of(1))
    assert write(survivor, volume, 2) == Result.SUCCESS
    assert len(copies_of(cluster, volume, 0)) == 3, "what is acknowledged is on all replicas"
    assert sum(len(copies_of(cluster, volume, index)) for index in held) == 2 * len(held) + 1

    victim.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)
    assert read(victim, volume) == (Result.SUCCESS, block_of(2))
    assert cluster.machines[0].node.cluster.away == []


def test_when_it_does_not_come_back_the_others_take_over() -> None:
    cluster, volume = fresh(5, 3)
    victim, held = victim_of(cluster, volume)
    victim.kill()
    cluster.world.run_for((DELAY_S + 3) * SECOND)
    assert cluster.probes().get("recovery.delay_ended")
    assert [len(copies_of(cluster, volume, index)) for index in held] == [3] * len(held)


def test_a_second_death_is_not_waited_for() -> None:
    """What is short of two copies is restored at once; what misses one only goes on waiting."""
    cluster, volume = fresh(6, 3)
    first, second = holders(cluster, volume)[1:]
    both = [i for i in range(OBJECTS) if {first, second} <= set(copies_of(cluster, volume, i))]
    one = [i for i in range(OBJECTS) if len({first, second} & set(copies_of(cluster, volume, i))) == 1]
    assert both
    assert one
    first.kill()
    cluster.world.run_for(SECOND)
    second.kill()
    cluster.world.run_for(3 * SECOND)
    assert [len(copies_of(cluster, volume, index)) for index in both] == [3] * len(both)
    assert [len(copies_of(cluster, volume, index)) for index in one] == [2] * len(one)


def test_a_node_that_joins_does_not_forget_who_is_away() -> None:
    cluster, volume = fresh(6, 3)
    victim, held = victim_of(cluster, volume)
    other = next(machine for machine in cluster.machines if machine not in holders(cluster, volume))
    other.kill()
    cluster.world.run_for((DELAY_S + 2) * SECOND)  # its time is over: all its objects are elsewhere
    victim.kill()
    cluster.world.run_for(SECOND)
    other.start()
    cluster.world.run_for(2 * SECOND)
    assert [len(copies_of(cluster, volume, 0))] == [2]
    assert [key for key, _ in other.node.cluster.away] == [
        key for key, _ in holders(cluster, volume)[0].node.cluster.away
    ]
    cluster.world.run_for(DELAY_S * SECOND)
    assert [len(copies_of(cluster, volume, index)) for index in held] == [3] * len(held)


def test_without_a_delay_nobody_is_waited_for() -> None:
    cluster = SimCluster(World(3), 5)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    victim, held = victim_of(cluster, volume)
    victim.kill()
    cluster.world.run_for(3 * SECOND)
    assert [len(copies_of(cluster, volume, index)) for index in held] == [3] * len(held)
