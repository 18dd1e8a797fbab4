"""What a small write of a coded volume costs: messages, and reads of the strips that it changes."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from tests.sim.test_directed import fresh

from sheepdog.cluster.core.ids import NodeId, ObjectId, Version, data_oid, plain_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, LEVEL_TICK_NS, LEVEL_WRITES
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.ports import ReadDone
from sheepdog.cluster.sim.clients import make_volume
from sheepdog.cluster.sim.network import SimNetwork
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import SECOND

WRITES = 64
DATA_STRIPS, PARITY = 4, 2


class Story:
    """Six nodes, and an object of 4:2 which its home's own clients write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, _ = fresh(6, 3)
        volume = make_volume(self.cluster, "coded", 1, (0,), policy=0x22)
        self.cluster.world.run_until(self.cluster.healthy, 5 * SECOND, "strips are level")
        self.oid = data_oid(volume.vid, 0)
        placement = self.cluster.machines[0].node.context.placement
        self.home = self.cluster.machine(placement.nodes[placement.replicas(self.oid)[0]])
        self.sent: Counter[Kind] = Counter()
        self.reads = 0
        send, read = SimNetwork.send, SimStore.read

        def sending(network: SimNetwork, node: NodeId, message: Message) -> None:
            self.sent[Kind(message.kind)] += 1
            send(network, node, message)

        def reading(store: SimStore, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
            self.reads += 1
            read(store, oid, offset, length, done)

        monkeypatch.setattr(SimNetwork, "send", sending)
        monkeypatch.setattr(SimStore, "read", reading)

    def write(self, number: int) -> None:
        """A block, in turns on each data strip."""
        answers: list[int] = []
        offset = 65_536 * (number % DATA_STRIPS) + BLOCK_SIZE * (number // DATA_STRIPS % 16)
        data = bytes([number % 256]) * BLOCK_SIZE
        self.home.node.gateway.write(self.oid, offset, data, False, lambda result, _: answers.append(result))
        self.cluster.world.run_until(partial(bool, answers), SECOND, "write")
        assert answers == [0]

    def versions(self) -> set[Version]:
        """Of the strips, on their disks."""
        return {
            machine.disk.copies()[strip].version
            for machine in self.cluster.machines
            for strip in machine.disk.copies()
            if plain_oid(strip) == self.oid
        }


def test_only_the_strips_that_change_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One data strip is written, and answers with what was there; two parity strips are written; the others learn of it
    later, all at once."""
    story = Story(monkeypatch)
    for number in range(WRITES):
        story.write(number)
    away = WRITES - WRITES // DATA_STRIPS  # the home has the first strip itself
    assert story.sent[Kind.FETCH] == 0
    assert story.sent[Kind.APPLY] == away + PARITY * WRITES
    assert story.sent[Kind.LEVEL] <= 5 * 5  # of the other members, some times
    assert story.reads == (1 + PARITY) * WRITES
    story.cluster.world.run_until(story.cluster.healthy, 5 * SECOND, "strips are level")
    assert len(story.versions()) == 1


def test_strips_are_brought_level_in_a_pause_or_after_many_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch)
    world = story.cluster.world
    for number in range(2 * LEVEL_WRITES):
        story.write(number)
        world.run_for(LEVEL_TICK_NS // 4)
    assert story.sent[Kind.LEVEL] in (5, 10)  # of the other members: at the first or second tick after so many writes
    assert len(story.versions()) > 1
    world.run_for(3 * LEVEL_TICK_NS)
    assert story.sent[Kind.LEVEL] in (10, 15)
    assert len(story.versions()) == 1
