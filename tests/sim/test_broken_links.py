"""Links between members break while the engine shows everybody: whoever can, goes on without one of them.

An expelled node stays away here, as the daemon sees to while it does not reach the members (cluster.host.reach).
"""

from __future__ import annotations

from functools import partial

import pytest

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import SILENT_TICKS, UNSETTLED_TICKS, VIGIL_TICK_NS
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

FOR_EVER_NS = 10_000 * SECOND
SOON_NS = (SILENT_TICKS + 4) * VIGIL_TICK_NS
LATER_NS = SOON_NS + (UNSETTLED_TICKS + 4) * VIGIL_TICK_NS
SEEDS = range(6)
OBJECTS = 12


def fresh(machines: int, copies: int, seed: int) -> tuple[SimCluster, Volume]:
    cluster = SimCluster(World(seed), machines)
    cluster.start_all()
    cluster.format(copies)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    keep_away(cluster)
    return cluster, volume


def keep_away(cluster: SimCluster) -> None:
    """Whoever is expelled from now on."""
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    for machine in cluster.machines:
        machine.hold_off(FOR_EVER_NS)


def break_links(cluster: SimCluster, one: Machine, *others: Machine) -> None:
    for other in others:
        cluster.fabric.break_link((min(one.id, other.id), max(one.id, other.id)), FOR_EVER_NS)


def _note(results: list[int], result: int, _: object) -> None:
    results.append(result)


def written(cluster: SimCluster, volume: Volume, value: int, limit_ns: int) -> int:
    """Writes to every object through every machine; how many machines have written them all within the limit."""
    results: list[list[int]] = []
    for machine in cluster.machines:
        if machine.up:
            mine: list[int] = []
            results.append(mine)
            for index in range(OBJECTS):
                oid = data_oid(volume.vid, index)
                machine.node.gateway.write(oid, 0, block_of(value), True, partial(_note, mine))
    cluster.world.run_for(limit_ns)
    return sum(mine == [Result.SUCCESS] * OBJECTS for mine in results)


@pytest.mark.parametrize("seed", SEEDS)
def test_between_two(seed: int) -> None:
    cluster, volume = fresh(4, 3, seed)
    break_links(cluster, *cluster.machines[:2])
    assert written(cluster, volume, 1, SOON_NS) == 3
    assert sum(machine.up for machine in cluster.machines) == 3


def test_between_two_after_a_start_of_all_without_a_disk_of_another() -> None:
    """What that one has forgotten it has been told again: everything is where it belongs."""
    cluster = SimCluster(World(1), 4)
    cluster.start_all()
    cluster.format(2)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    for machine in cluster.machines:
        machine.kill()
    cluster.machines[3].lose_disk_while_down()
    cluster.start_all()
    keep_away(cluster)
    break_links(cluster, *cluster.machines[:2])
    assert written(cluster, volume, 1, SOON_NS) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_to_one_that_joins(seed: int) -> None:
    cluster, volume = fresh(3, 3, seed)
    new = cluster.add_machine()
    break_links(cluster, cluster.machines[0], new)
    new.start()
    new.hold_off(FOR_EVER_NS)
    cluster.world.run_for(SECOND)
    assert written(cluster, volume, 1, SOON_NS) == 0
    assert written(cluster, volume, 1, LATER_NS) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_and_a_third_member_is_lost_at_that_moment(seed: int) -> None:
    cluster, volume = fresh(3, 3, seed)
    break_links(cluster, *cluster.machines[:2])
    cluster.machines[2].kill()
    assert written(cluster, volume, 1, LATER_NS) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_who_may_hold_what_nobody_else_has_is_waited_for(seed: int) -> None:
    cluster, volume = fresh(3, 2, seed)
    break_links(cluster, *cluster.machines[:2])
    cluster.machines[2].kill()
    assert written(cluster, volume, 1, LATER_NS) == 0
    assert [machine.up for machine in cluster.machines] == [True, True, False]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("machines", [3, 5])
def test_of_one_to_all_others(machines: int, seed: int) -> None:
    cluster, volume = fresh(machines, 3, seed)
    break_links(cluster, cluster.machines[0], *cluster.machines[1:])
    assert written(cluster, volume, 1, LATER_NS) >= machines - 2
