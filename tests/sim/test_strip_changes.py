"""A node that was away gets back of its strips what changed meanwhile, and no more; the strips fit each other then."""

from __future__ import annotations

from functools import partial

import pytest

from sheepdog.cluster.core.ids import ObjectId, Version, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.strip_changes import StripChanges
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import OBJECT_BYTES, Volume, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.history import Violation
from sheepdog.cluster.sim.world import SECOND, World

NODES = 6
CODED = 0x22  # 4:2
OBJECTS = 8
MISSED = 5  # writes, of 512 blocks that each node has of the volume


class Story:
    """A full volume; a node goes and comes back."""

    def __init__(self, seed: int) -> None:
        self.cluster = SimCluster(World(seed), NODES)
        self.cluster.start_all()
        self.cluster.format(3)
        self.random = self.cluster.world.stream("changes")
        self.volume: Volume = make_volume(self.cluster, "v", OBJECTS, (), policy=CODED)
        self.away, self.staying = self.cluster.machines[2], self.cluster.machines[0]
        for index in range(OBJECTS):
            self.write(index, 0, self.random.randbytes(OBJECT_BYTES))
        self.settle()

    def write(self, index: int, offset: int, data: bytes, wait: bool = True) -> None:
        results: list[int] = []
        oid = data_oid(self.volume.vid, index)
        self.staying.node.gateway.write(oid, offset, data, False, lambda result, _: results.append(result))
        if wait:
            self.cluster.world.run_until(partial(bool, results), 20 * SECOND, "write")
            assert results == [0]

    def scribble(self, count: int, wait: bool = True) -> None:
        for _ in range(count):
            block = self.random.randrange(OBJECT_BYTES // BLOCK_SIZE)
            data = self.random.randbytes(BLOCK_SIZE)
            self.write(self.random.randrange(OBJECTS), block * BLOCK_SIZE, data, wait)

    def settle(self) -> None:
        self.cluster.world.run_until(self.cluster.healthy, 60 * SECOND, "health")
        self.cluster.world.run_for(SECOND)

    def leave(self, machine: Machine) -> None:
        machine.kill()
        self.cluster.world.run_for(5 * SECOND)

    def come_back(self) -> int:
        """Bytes that the node was given of its strips."""
        self.cluster.start_all()
        self.settle()
        audit(self.cluster)
        copies = self.away.node.copies
        return copies.rebuilder.bytes_rebuilt


@pytest.mark.parametrize("seed", range(3))
def test_a_node_is_given_what_it_missed(seed: int) -> None:
    story = Story(seed)
    story.leave(story.away)
    story.scribble(MISSED)
    assert 0 < story.come_back() <= MISSED * BLOCK_SIZE


@pytest.mark.parametrize("seed", range(3))
def test_after_writes_that_were_on_their_way(seed: int) -> None:
    """Some strips had them, others had not, and the versions were level nowhere."""
    story = Story(seed)
    story.scribble(MISSED)
    story.scribble(MISSED, wait=False)
    story.leave(story.away)
    story.scribble(MISSED)
    assert 0 < story.come_back() <= 3 * MISSED * BLOCK_SIZE


def test_through_several_epochs() -> None:
    """Mostly: where the strips were not level when a node went, one of them may have to be made whole."""
    given = []
    for seed in range(8, 13):
        story = Story(seed)
        other = story.cluster.machines[4]
        story.leave(story.away)
        story.scribble(MISSED)
        story.leave(other)
        story.scribble(MISSED)
        given.append(story.come_back())
    assert 0 < sorted(given)[len(given) // 2] <= 2 * MISSED * BLOCK_SIZE


def test_whole_stripes_are_changes_too() -> None:
    story = Story(11)
    story.leave(story.away)
    story.write(0, 0, bytes(OBJECT_BYTES))
    story.scribble(1)
    assert OBJECT_BYTES // 4 <= story.come_back() <= OBJECT_BYTES // 4 + BLOCK_SIZE


def test_a_change_that_is_not_noted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: what the rebuilt strip lacks shows."""
    note = StripChanges.note

    def forgets(self: StripChanges, strip: ObjectId, before: Version, after: Version, offset: int, length: int) -> None:
        note(self, strip, before, after, offset, 0)

    monkeypatch.setattr(StripChanges, "note", forgets)
    story = Story(2)
    story.leave(story.away)
    story.scribble(MISSED)
    with pytest.raises(Violation, match="strip"):
        story.come_back()
