"""When a pass of the scrub begins, and how much of the disk's time it takes."""

from __future__ import annotations

from functools import partial

from tests.sim.test_directed import fresh

from sheepdog.cluster.core.limits import SCRUB_TICK_NS, SCRUB_YIELD
from sheepdog.cluster.core.scrub import Scrub
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import SECOND

MIB = 1 << 20
RATE = MIB
HOUR = 3600 * SECOND
SLACK = 1.2  # what else a pass takes


def scrub_of(machine: Machine) -> Scrub:
    return machine.node.scrub


def pass_ns(machine: Machine) -> int:
    world, scrub = machine.cluster.world, scrub_of(machine)
    began, passes = world.now_ns, scrub.passes
    scrub.start()
    world.run_until(lambda: scrub.passes > passes, 3600 * SECOND, "the pass")
    return world.now_ns - began


def test_a_pass_keeps_to_its_rate_and_yields_to_clients() -> None:
    cluster, _ = fresh(3, 3)
    machine = cluster.machines[0]
    context = machine.node.context
    held = sum(context.store.size(oid) for oid, _ in context.store.inventory())
    assert held > 10 * MIB
    assert scrub_of(machine).schedule(0, RATE)
    alone = held * SECOND // RATE
    assert alone <= pass_ns(machine) < SLACK * alone
    context.active_requests = lambda: 1
    assert SCRUB_YIELD * alone <= pass_ns(machine) < SLACK * SCRUB_YIELD * alone


def test_a_pass_begins_by_itself_when_it_is_time() -> None:
    cluster, _ = fresh(3, 3)
    scrub = scrub_of(cluster.machines[0])
    assert scrub.schedule(1, 1 << 30)

    def has_passed(times: int) -> bool:
        return scrub.passes == times

    for passes in (1, 2):
        cluster.world.run_for(HOUR - 60 * SECOND)
        assert has_passed(passes - 1)
        cluster.world.run_until(partial(has_passed, passes), 60 * SECOND + 2 * SCRUB_TICK_NS, "the pass")
    assert scrub.schedule(0, 1 << 30)
    cluster.world.run_for(2 * HOUR)
    assert scrub.passes == 2
