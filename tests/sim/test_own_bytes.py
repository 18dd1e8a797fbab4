"""A replica through which a write came is told its number alone: it has the bytes."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, holders, read, write

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.sim.clients import value_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine
from sheepdog.cluster.sim.world import SECOND


def watched(home: Machine, monkeypatch: pytest.MonkeyPatch) -> dict[NodeId, tuple[bool, int]]:
    """Of each node's last APPLY from this home: whether it is told to take its own bytes, and how many were sent."""
    found: dict[NodeId, tuple[bool, int]] = {}
    network = home.node.context.peers.network
    send = network.send

    def sent(node: NodeId, message: Message) -> None:
        if message.kind == Kind.APPLY:
            assert isinstance(message.body, (bytes, bytearray, memoryview))
            found[node] = bool(message.flags & Flag.OWN), len(message.body)
        send(node, message)

    monkeypatch.setattr(network, "send", sent)
    return found


def test_a_gateway_that_is_a_replica_gets_no_bytes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, volume = fresh(3, 3)
    home, second, third = holders(cluster, volume)
    applied = watched(home, monkeypatch)
    full, own = (False, BLOCK_SIZE), (True, 0)
    for number, (gateway, expected) in enumerate([(home, [full, full]), (second, [own, full]), (third, [full, own])]):
        assert write(gateway, volume, 10 + number) == Result.SUCCESS
        assert [applied[machine.id] for machine in (second, third)] == expected
        oid = data_oid(volume.vid, 0)
        copies = [machine.disk.copies()[oid] for machine in (home, second, third)]
        assert [value_of(copy.read(0, BLOCK_SIZE), "copy") for copy in copies] == [10 + number] * 3
        assert len({copy.version for copy in copies}) == 1


def test_bytes_that_are_gone_cost_the_copy_until_it_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way is known to that; if there is one, the copy must not count as one that has the write."""
    cluster, volume = fresh(3, 3)
    home, second, _ = holders(cluster, volume)
    with monkeypatch.context() as broken:
        broken.setattr(second.node.context, "submitted", lambda number: b"")
        write(second, volume, 7)
        assert cluster.probes()["replica.own_bytes_gone"] == 1
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    cluster.world.run_for(SECOND)
    oid = data_oid(volume.vid, 0)
    assert second.disk.copies()[oid].read(0, BLOCK_SIZE) == home.disk.copies()[oid].read(0, BLOCK_SIZE)
    assert len({read(machine, volume)[1] for machine in cluster.machines}) == 1
