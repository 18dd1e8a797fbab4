"""What an administrator may do to recovery, and what may happen to it: off, throttled, power lost in its middle."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import holders, read, settle, write
from tests.sim.test_recovery_delay import OBJECTS, copies_of, victim_of

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World


def fresh(machines: int, copies: int, seed: int = 3) -> tuple[SimCluster, Volume]:
    cluster = SimCluster(World(seed), machines)
    cluster.start_all()
    cluster.format(copies)
    return cluster, make_volume(cluster, "v", OBJECTS, (0,))


def set_recovery(machine: Machine, enabled: bool) -> None:
    results: list[Result] = []
    machine.node.operations.set_recovery(enabled, results.append)
    machine.cluster.world.run_until(lambda: bool(results), SECOND, "recovery on or off")
    assert results == [Result.SUCCESS]


def short_objects(cluster: SimCluster, volume: Volume, copies: int) -> list[int]:
    return [index for index in range(OBJECTS) if len(copies_of(cluster, volume, index)) < copies]


def home_of(machine: Machine, volume: Volume, index: int) -> int:
    return machine.node.context.placement.replicas(data_oid(volume.vid, index))[0]


def test_disabled_recovery_moves_only_what_is_written() -> None:
    cluster, volume = fresh(5, 3)
    victim, held = victim_of(cluster, volume)
    survivor = holders(cluster, volume)[0]
    set_recovery(survivor, False)
    victim.kill()
    cluster.world.run_for(5 * SECOND)
    assert short_objects(cluster, volume, 3) == held
    assert read(survivor, volume)[0] == Result.SUCCESS
    assert write(survivor, volume, 5) == Result.SUCCESS
    assert short_objects(cluster, volume, 3) == held[1:], "what is written is on all its replicas"
    set_recovery(survivor, True)
    settle(cluster, *[machine for machine in cluster.machines if machine is not victim])
    assert short_objects(cluster, volume, 3) == []


def test_throttled_recovery_takes_its_time() -> None:
    """Each home begins at most one object in 500 ms."""
    cluster, volume = fresh(5, 3)
    victim, held = victim_of(cluster, volume)
    survivors = [machine for machine in cluster.machines if machine is not victim]
    for machine in survivors:
        machine.node.context.throttle = (1, 500 * MILLISECOND)
    victim.kill()
    cluster.world.run_until(lambda: len(survivors[0].node.cluster.members) == 4, SECOND, "death noticed")
    by_home: dict[int, int] = {}
    placement = survivors[0].node.context.placement
    for index in held:
        home = placement.replicas(data_oid(volume.vid, index))[0]
        by_home[home] = by_home.get(home, 0) + 1
    begin_ns, most = cluster.world.now_ns, max(by_home.values())
    assert most >= 2
    settle(cluster, *survivors)
    assert cluster.world.now_ns - begin_ns >= (most - 1) * 500 * MILLISECOND
    assert short_objects(cluster, volume, 3) == []


@pytest.mark.parametrize("after_ms", [0, 2, 5, 8, 12, 20, 40, 90])
def test_power_fails_everywhere_in_the_middle_of_recovery(after_ms: int) -> None:
    cluster, volume = fresh(4, 2)
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    replica.kill()
    cluster.world.run_until(lambda: len(home.node.cluster.members) == 3, SECOND, "death noticed")
    results: list[int] = []
    oid = data_oid(volume.vid, 0)
    home.node.gateway.write(oid, 0, block_of(2), True, lambda result, _: results.append(int(result)))
    cluster.world.run_for(after_ms * MILLISECOND)
    acknowledged = bool(results)
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)
    result, data = read(home, volume)
    assert result == Result.SUCCESS
    assert data in ((block_of(2),) if acknowledged else (block_of(1), block_of(2)))
    assert read(replica, volume) == (result, data)


def test_more_copies_than_zones() -> None:
    """All zones have one; the missing ones are made when zones come."""
    cluster, volume = fresh(4, 4)
    late = cluster.machines[3]
    late.kill()
    settle(cluster, *cluster.machines[:3])
    assert [len(copies_of(cluster, volume, index)) for index in range(OBJECTS)] == [3] * OBJECTS
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    late.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)
    assert [len(copies_of(cluster, volume, index)) for index in range(OBJECTS)] == [4] * OBJECTS


@pytest.mark.parametrize("missing", range(4))
def test_members_of_the_last_epoch_decide_in_any_order(missing: int) -> None:
    """Nobody serves until the last of them is here, whoever it is; then all goes on without a new epoch."""
    cluster, volume = fresh(4, 2)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    epoch = cluster.machines[0].node.context.epoch
    for machine in cluster.machines:
        machine.kill()
    order = [machine for machine in cluster.machines[::-1] if machine.number != missing]
    for machine in order:
        machine.start()
        cluster.world.run_for(300 * MILLISECOND)
    assert read(order[0], volume)[0] == Result.WAIT_FOR_JOIN
    cluster.machines[missing].start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert {machine.node.context.epoch for machine in cluster.machines} == {epoch}
    assert read(order[-1], volume) == (Result.SUCCESS, block_of(1))


def test_what_has_the_fewest_copies_comes_first() -> None:
    """Two of five nodes have gone, while nothing was restored: some objects have one copy left, others two."""
    cluster, volume = fresh(5, 3)
    survivors, dying = cluster.machines[:3], cluster.machines[3:]
    set_recovery(survivors[0], False)
    for machine in dying:
        machine.kill()
    cluster.world.run_until(lambda: len(survivors[0].node.cluster.members) == 3, SECOND, "deaths noticed")
    cluster.world.run_for(SECOND)
    left = {index: len(copies_of(cluster, volume, index)) for index in range(OBJECTS)}
    homes = {index: home_of(survivors[0], volume, index) for index in range(OBJECTS)}
    assert any({left[index] for index in range(OBJECTS) if homes[index] == home} >= {1, 2} for home in range(3)), (
        "no home has both"
    )
    for machine in survivors:
        machine.node.context.throttle = (1, 100 * MILLISECOND)
    set_recovery(survivors[0], True)
    restored: list[int] = []
    for _ in range(20 * OBJECTS):
        cluster.world.run_for(25 * MILLISECOND)
        short = short_objects(cluster, volume, 3)
        restored += [
            index for index in range(OBJECTS) if index not in short and index not in restored and left[index] < 3
        ]
        if not short:
            break
    assert short_objects(cluster, volume, 3) == []
    for home in range(3):
        order = [left[index] for index in restored if homes[index] == home]
        assert order == sorted(order)
