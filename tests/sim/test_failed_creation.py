"""An object that cannot be made on every replica is unmade; what others do to it meanwhile must not go with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from sheepdog.cluster.core.errors import NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.sim.clients import block_of, make_thin_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World


def fails_at(machine: Machine, number: int) -> None:
    """The disk is full for that change from now on, counted from 1, and for no other."""
    changes = 0

    def fault(text: str) -> StoreError | None:
        nonlocal changes
        changes += 1
        if changes < number:
            return None
        machine.disk.heal()
        return NoSpace(text)

    machine.disk.fault_chance = 1.0
    machine.disk.fault = cast("type[StoreError]", fault)


def two_make_it(seed: int, policy: int, again: bool, failing: int) -> tuple[bool, int]:
    """Two gateways make one object at a time, with `again` behind a write and the removal of a former one of that name;
    a replica's change number `failing` finds no space.

    (only the first creation failed, how often a change had to wait for a creation)
    """
    cluster = SimCluster(World(seed), 4)
    cluster.start_all()
    cluster.format(3)
    world = cluster.world
    oid = data_oid(make_thin_volume(cluster, "v", 1, policy=policy).vid, 0)
    world.run_for(SECOND)
    placement = cluster.machines[0].node.context.placement
    home, *replicas = [cluster.machine(placement.nodes[index]) for index in placement.replicas(oid)]
    other = next(machine for machine in cluster.machines if machine is not home)
    results: dict[str, int] = {}

    def done(name: str) -> Callable[[int, Buffer], None]:
        return lambda result, _: results.update({name: result})

    def make(machine: Machine, name: str, block: int) -> None:
        machine.node.gateway.create(oid, ObjectId(0), block * BLOCK_SIZE, block_of(block), True, done(name))

    if again:
        make(home, "former", 0)
        world.run_until(lambda: bool(results), 10 * SECOND, "the former object")
        home.node.gateway.write(oid, 0, block_of(3), True, done("write"))
        home.node.gateway.remove(oid, done("removal"))
    fails_at(replicas[-1], failing)
    make(home, "first", 1)
    make(home if again else other, "second", 2)
    world.run_until(lambda: len(results) == (5 if again else 2), 10 * SECOND, "two creations")
    if results["second"]:
        assert results["second"] == Result.NO_SPACE
        return False, 0
    read: list[bytes] = []
    other.node.gateway.read(oid, 2 * BLOCK_SIZE, BLOCK_SIZE, lambda _, data: read.append(bytes(data)))
    world.run_until(lambda: bool(read), SECOND, "read")
    assert read == [block_of(2)], "what was answered is there"
    return results["first"] == Result.NO_SPACE, home.node.context.probes.get("home.waits_for_creation", 0)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("policy", [0, 0x11])
def test_what_is_written_to_an_object_that_is_being_made(policy: int, again: bool) -> None:
    outcomes = [two_make_it(seed, policy, again, 2 if again else 1) for seed in range(4)]
    assert any(failed and waited for failed, waited in outcomes), outcomes
