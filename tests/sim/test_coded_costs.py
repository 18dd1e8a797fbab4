"""What a small write of a coded volume costs: messages, and reads of the strips that it changes."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from tests.sim.test_directed import fresh

from sheepdog.cluster.core.ids import NodeId, ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.ports import ReadDone
from sheepdog.cluster.sim.clients import make_volume
from sheepdog.cluster.sim.network import SimNetwork
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import SECOND

WRITES = 64
DATA_STRIPS, PARITY = 4, 2


def test_only_the_strips_that_change_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One data strip is written, and answers with what was there; two parity strips are written; the others learn of it
    later, all at once."""
    cluster, _ = fresh(6, 3)
    volume = make_volume(cluster, "coded", 1, (0,), policy=0x22)
    cluster.world.run_until(cluster.healthy, 5 * SECOND, "strips are level")
    oid = data_oid(volume.vid, 0)
    placement = cluster.machines[0].node.context.placement
    home = cluster.machine(placement.nodes[placement.replicas(oid)[0]])
    sent: Counter[Kind] = Counter()
    reads = 0
    send, read = SimNetwork.send, SimStore.read

    def sending(self: SimNetwork, node: NodeId, message: Message) -> None:
        sent[Kind(message.kind)] += 1
        send(self, node, message)

    def reading(self: SimStore, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        nonlocal reads
        reads += 1
        read(self, oid, offset, length, done)

    monkeypatch.setattr(SimNetwork, "send", sending)
    monkeypatch.setattr(SimStore, "read", reading)
    for number in range(WRITES):
        answers: list[int] = []
        offset = 65_536 * (number % DATA_STRIPS) + BLOCK_SIZE * (number // DATA_STRIPS)
        home.node.gateway.write(
            oid,
            offset,
            bytes([number]) * BLOCK_SIZE,
            False,
            lambda result, _: answers.append(result),  # noqa: B023
        )
        cluster.world.run_until(partial(bool, answers), SECOND, "write")
        assert answers == [0]
    away = WRITES - WRITES // DATA_STRIPS  # the home has the first strip itself
    assert sent[Kind.FETCH] == 0
    assert sent[Kind.APPLY] == away + PARITY * WRITES
    assert sent[Kind.LEVEL] <= 5 * 5  # of the other members, some times
    assert reads == (1 + PARITY) * WRITES
    cluster.world.run_until(cluster.healthy, 5 * SECOND, "strips are level")
    versions = {
        machine.disk.copies()[strip].version
        for machine in cluster.machines
        for strip in machine.disk.copies()
        if strip & 0xFFFFFFFFFFFFFFFF == oid
    }
    assert len(versions) == 1
