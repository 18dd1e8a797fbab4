"""Objects of which no current copy is left among the nodes that are here (`regressions.jsonl` has one that nobody can
bring back, and that nobody wants any more: it goes)."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, holders, only_an_old_copy, read, settle, write
from tests.sim.test_refused_strips import UNIT, Story, empty, fill

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import NO_VERSION, NO_VID, ObjectId, data_oid, inode_oid, strip_of
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.core.stale_strips import StaleStrips
from sheepdog.cluster.sim.clients import block_of, make_volume
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import SECOND


def test_a_lost_object_that_may_come_back_is_not_removed() -> None:
    """The node with the newer copy would bring it back."""
    cluster, volume = fresh(2, 2)
    here, away = only_an_old_copy(cluster, volume)
    results: list[int] = []
    here.node.gateway.remove(data_oid(volume.vid, 0), lambda result, _: results.append(int(result)))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.EIO]
    away.start()
    settle(cluster, here, away)
    assert read(here, volume) == (Result.SUCCESS, block_of(2))


def test_nor_is_it_given_back_by_one_of_several_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would come back with its bytes, and another client that makes it again would take it for new."""
    monkeypatch.setattr(Gateway, "is_among_others", lambda self, oid: True)
    monkeypatch.setattr(Gateway, "zero", lambda self, oid, offset, length, durable, done: done(Result.EIO, b""))
    cluster, volume = fresh(2, 2)
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    results: list[int] = []
    place, zero = map_offset(0), NO_VID.to_bytes(4, "little")
    replica.node.gateway.write(inode_oid(volume.vid), place, zero, True, lambda result, _: results.append(int(result)))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.EIO]
    assert read(replica, volume) == (Result.SUCCESS, block_of(1))


def is_lost(machine: Machine, oid: ObjectId) -> bool:
    home = machine.node.copies.home
    return home is not None and home.active and home.is_lost(oid)


def not_written_while_it_was_lost(seed: int) -> tuple[int, bytes]:
    """2:1. A node is to have its strip made anew, and has no space; a third one, which has one, goes. The two that are
    left know of one strip. Meanwhile a copy of something else goes bad on the full node. Then all start again."""
    story = Story(seed)
    other = make_volume(story.cluster, "other", 1, (0,), copies=2)
    world = story.cluster.world
    full = story.second
    story.wait(story.write(0, 1), story.write(UNIT, 1))
    story.settle()
    full.kill()
    settle(story.cluster, story.home, story.parity)
    story.wait(story.write(0, 2), story.write(UNIT, 2))
    full.start()
    fill(full)
    oid = strip_of(story.oid, 1)
    world.run_until(
        lambda: full.up and full.node.context.store.version(oid) == NO_VERSION, 10 * SECOND, "a restore begun"
    )
    story.parity.kill()
    world.run_until(lambda: any(is_lost(machine, story.oid) for machine in (story.home, full)), 20 * SECOND, "a loss")
    story.home.node.gateway.write(data_oid(other.vid, 0), 0, block_of(3), True, lambda result, _: None)
    world.run_until(lambda: full.state.proven.broken == full.node.context.epoch, 5 * SECOND, "something else goes bad")
    world.run_for(SECOND)
    for machine in (story.home, full):
        machine.kill()
    empty(full)
    story.cluster.start_all()
    story.cluster.world.run_for(20 * SECOND)
    return story.read(story.home, 0)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_lost_for_a_while_was_not_written_meanwhile(seed: int) -> None:
    """The full node alone can say so besides the home: it remembers that its strip was none of those that went bad."""
    assert not_written_while_it_was_lost(seed) == (Result.SUCCESS, block_of(2))


def test_it_would_stay_lost_if_nobody_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaleStrips, "losses", lambda self, version_of: {})
    assert not_written_while_it_was_lost(0)[0] == Result.EIO
