"""A restore that a client waits for overtakes those that are under way, and all others leave room for clients."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, settle

from sheepdog.cluster.core import puller
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.clients import OBJECT_BYTES, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

OBJECTS = 60


def test_what_clients_wait_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many objects that a node lacks, the one that is written is there while hardly any other is."""
    monkeypatch.setattr(puller, "PULL_CHUNK_BYTES", OBJECT_BYTES // 16)
    cluster, _ = fresh(4, 3)
    world = cluster.world
    volume = make_volume(cluster, "large", OBJECTS, ())
    gateway = cluster.machines[0].node.gateway
    results: list[int] = []
    for index in range(OBJECTS):
        oid = data_oid(volume.vid, index)
        gateway.write(oid, 0, b"x" * OBJECT_BYTES, False, lambda result, _: results.append(result))
    world.run_until(lambda: len(results) == OBJECTS, 60 * SECOND, "writes")
    dying, *staying = cluster.machines[::-1]
    cluster.fabric.max_latency_ns *= 20  # so that restores take a while

    def lacking(machine: Machine) -> list[ObjectId]:
        return [oid for index in range(OBJECTS) if (oid := data_oid(volume.vid, index)) not in machine.disk.copies()]

    dying.kill()
    world.run_until(lambda: all(m.node.home is not None and m.node.home.active for m in staying), 5 * SECOND, "peering")
    target = max(staying, key=lambda machine: len(lacking(machine)))
    before = lacking(target)
    world.run_until(lambda: len(lacking(target)) < len(before), SECOND, "the first restore begins")
    wanted = before[-1]
    results.clear()
    gateway.write(wanted, 0, b"y" * BLOCK_SIZE, False, lambda result, _: results.append(result))
    world.run_until(lambda: bool(results), 5 * SECOND, "a write")
    assert results == [Result.SUCCESS]
    restored = [oid for oid, copy in target.disk.copies().items() if oid in before and copy.version.epoch]
    assert wanted in restored
    assert len(restored) < len(before) / 2, f"{len(restored)} of {len(before)}"
    assert sum(machine.node.context.probes.get("puller.gives_way", 0) for machine in staying)
    settle(cluster, *staying)


@pytest.mark.parametrize("policy", [0, 0x21], ids=["copies", "4:1"])
def test_restores_leave_room_for_clients(policy: int) -> None:
    """All is restored while a client writes all the time, in small steps; without clients nothing pauses."""
    cluster = SimCluster(World(policy), 6)
    cluster.start_all()
    cluster.format(3)
    world = cluster.world
    volume = make_volume(cluster, "v", OBJECTS, (), policy=policy)
    gateway = cluster.machines[0].node.gateway
    results: list[int] = []
    objects = [data_oid(volume.vid, index) for index in range(OBJECTS)]
    for oid in objects:
        gateway.write(oid, 0, b"x" * OBJECT_BYTES, False, lambda result, _: results.append(result))
    world.run_until(lambda: len(results) == OBJECTS, 60 * SECOND, "writes")

    def yields() -> int:
        return sum(machine.node.context.probes.get("pace.yields", 0) for machine in cluster.machines[:-1])

    def write_on(result: int = 0, _: object = None) -> None:
        results.append(result)
        if writing:
            gateway.write(whole, 0, b"x" * BLOCK_SIZE, False, write_on)

    placement = cluster.machines[0].node.context.placement
    victim = placement.index_of[cluster.machines[-1].id]
    whole = next(oid for oid in objects if victim not in placement.replicas(oid))
    world.run_for(SECOND)  # what made the volume is no client at work any more
    for writing in (False, True):
        before, count = yields(), len(results)
        cluster.machines[-1].kill()
        write_on()
        settle(cluster, *cluster.machines[:-1])
        assert (yields() > before) == writing
        assert (len(results) > count + 1) == writing
        writing = False
        world.run_for(SECOND)
        cluster.machines[-1].start()
        world.run_until(cluster.healthy, 60 * SECOND, "health")
    assert not any(results)
