"""A restore that a client waits for overtakes those that are under way."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, settle

from sheepdog.cluster.core import puller
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.clients import OBJECT_BYTES, make_volume
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import SECOND

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
