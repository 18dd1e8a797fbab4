"""Changes of one strip take effect in the order in which they come, whatever the store takes its time for."""

from __future__ import annotations

import pytest
from tests.sim.test_refused_strips import UNIT, Story

from sheepdog.cluster.core.ids import ObjectId, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import ReadDone
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import MILLISECOND


def test_what_a_read_brings_about_is_behind_the_changes_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip is being read for a change; behind it wait a read, of which a change comes, and another change."""
    story = Story(0)
    story.wait(story.write(UNIT, 1))
    story.settle()
    strips, store = story.second.node.replica.strips, story.second.node.context.store
    assert isinstance(store, SimStore)
    strip, order = strip_of(story.oid, 1), list[int]()
    version = store.version(strip)
    assert version is not None
    versions = [version._replace(counter=version.counter + number) for number in (1, 2, 3)]
    slow = iter([True])

    def read(oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        if next(slow, False):
            story.cluster.world.after(MILLISECOND, lambda: done(store._read(oid, offset, length)))
        else:
            done(store._read(oid, offset, length))

    def perform(number: int) -> None:
        strips.perform(
            0, strip, number * BLOCK_SIZE, 2, b"x", versions[number], lambda: order.append(number), lambda error: None
        )

    monkeypatch.setattr(store, "read", read)
    perform(0)
    strips.look(strip, 2 * BLOCK_SIZE, BLOCK_SIZE, lambda data: perform(2))
    perform(1)
    story.cluster.world.run_for(10 * MILLISECOND)
    assert order == [0, 1, 2]
    assert store.version(strip) == versions[-1]
