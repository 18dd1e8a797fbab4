"""Coded objects are read while a strip is rebuilt: what the others tell is enough, the rebuild may take its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from tests.sim.test_directed import holders, settle
from tests.sim.test_refused_strips import UNIT, Story

from sheepdog.cluster.core.ids import ObjectId, Version, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import SECOND

OFFSETS = (0, BLOCK_SIZE, UNIT)


def held_restores(patch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """No restore ends from now on; those that would are listed."""
    held: list[Callable[[], None]] = []
    finish = SimStore.restore_finish

    def hold(self: SimStore, oid: ObjectId, version: Version, done: Done) -> None:
        held.append(partial(finish, self, oid, version, done))

    patch.setattr(SimStore, "restore_finish", hold)
    return held


def written(seed: int) -> Story:
    story = Story(seed)
    story.wait(*(story.write(offset, 1) for offset in OFFSETS))
    return story


@pytest.mark.parametrize("seed", range(4))
def test_a_node_returns_with_an_old_strip(seed: int) -> None:
    story = written(seed)
    story.parity.kill()
    settle(story.cluster, story.home, story.second)
    story.wait(*(story.write(offset, 2) for offset in OFFSETS))
    with pytest.MonkeyPatch.context() as patch:
        held = held_restores(patch)
        story.parity.start()
        story.cluster.world.run_until(lambda: bool(held), 5 * SECOND, "the rebuild")
        assert story.blocks(*OFFSETS) == [block_of(2)] * 3
    for end in held:
        end()
    story.settle()
    assert story.blocks(*OFFSETS) == [block_of(2)] * 3
    audit(story.cluster)


@pytest.mark.parametrize("seed", range(4))
def test_a_strip_rots_just_after_a_write(seed: int) -> None:
    """Before the strips are level nobody knows what to rebuild it to; then reads go on, and the rebuild for itself."""
    story = written(seed)
    story.settle()
    story.wait(story.write(0, 2))
    story.second.disk.copies()[strip_of(story.oid, 1)].rotten[0] = None
    with pytest.MonkeyPatch.context() as patch:
        held = held_restores(patch)
        assert story.blocks(UNIT, 0) == [block_of(1), block_of(2)]
        story.cluster.world.run_until(lambda: bool(held), 5 * SECOND, "the rebuild")
    for end in held:
        end()
    story.settle()
    assert story.blocks(*OFFSETS) == [block_of(2), block_of(1), block_of(1)]
    audit(story.cluster)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_read_meanwhile_is_not_taken_back(seed: int) -> None:
    """A write is on the data strips only, and read so, while one parity strip is old; then the node of the other one
    returns, which had been there when the write began: it must not seem to know as much as the data strips."""
    story = Story(seed, 6)
    world = story.cluster.world
    *data_nodes, old, late = holders(story.cluster, story.volume)
    data = b"".join(block_of(value) for value in range(len(data_nodes) * UNIT // BLOCK_SIZE))
    story.wait(*(story.write(offset, 1) for offset in OFFSETS))
    old.kill()
    settle(story.cluster, *data_nodes, late)

    def versions() -> list[Version]:
        return [one.disk.copies()[strip_of(story.oid, strip)].version for strip, one in enumerate(data_nodes)]

    before = versions()
    story.cluster.fabric.hold((story.home.id, late.id), SECOND)
    late.node.gateway.write(story.oid, 0, data, True, lambda result, _: None)
    world.run_until(lambda: not any(version in before for version in versions()), SECOND, "the write")
    late.kill()
    pair = min(story.home.id, story.second.id), max(story.home.id, story.second.id)
    story.cluster.fabric.break_link(pair, SECOND)  # the data nodes alone come to no conclusion
    with pytest.MonkeyPatch.context() as patch:
        held = held_restores(patch)
        old.start()
        world.run_until(lambda: bool(held), 5 * SECOND, "the rebuild")
        seen = {story.read(machine, UNIT) for machine in story.cluster.machines if machine.up}
        assert seen == {(0, data[UNIT : UNIT + BLOCK_SIZE])}
        late.start()
        world.run_until(story.cluster.all_joined, 5 * SECOND, "the return")
    story.settle()
    now = story.blocks(0, UNIT)
    assert [block[:8] for block in now] == [data[:8], data[UNIT : UNIT + 8]], "what was read was taken back"
    audit(story.cluster)
