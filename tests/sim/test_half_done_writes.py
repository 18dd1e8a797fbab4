"""Writes that some data strips refused: nobody is told that they are done, and what was read of them stays."""

from __future__ import annotations

import pytest
from tests.sim.test_refused_strips import SEEDS, UNIT, Story, empty, fill

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Kind
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import SECOND


def ask(story: Story, gateway: Machine, offset: int, *values: int) -> list[int]:
    """Begins a durable write of some blocks through another gateway; its result comes into the list."""
    results: list[int] = []
    data = b"".join(map(block_of, values))
    gateway.node.gateway.write(story.oid, offset, data, True, lambda result, _: results.append(int(result)))
    return results


def taken_as_they_are(seed: int, offset: int, *values: int) -> tuple[Story, list[int]]:
    """A data strip and the parity refuse a write, and its gateway does not hear of that before the next epoch begins.
    By then the data strips are one state. Returns the write's results."""
    story = Story(seed, 4, 0x11)
    story.wait(story.write(UNIT - BLOCK_SIZE, 1), story.write(UNIT, 1))
    story.settle()
    (gateway,) = (one for one in story.cluster.machines if one not in (story.home, story.second, story.parity))
    fill(story.second, story.parity)
    story.cluster.fabric.hold((story.home.id, gateway.id), SECOND)
    results = ask(story, gateway, offset, *values)
    story.cluster.world.run_for(SECOND // 4)
    agreed = [0]

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        agreed[0] += kind == Kind.ROLLBACK

    story.cluster.fabric.trap = trap
    empty(story.second)
    story.cluster.world.run_until(lambda: bool(agreed[0]), 5 * SECOND, "one state of the data strips")
    story.cluster.world.run_for(SECOND // 10)
    story.cluster.fabric.trap = None
    assert not results
    story.parity.kill()
    story.wait(results)
    return story, results


@pytest.mark.parametrize(
    ("offset", "values"), [(UNIT - BLOCK_SIZE, (2, 2)), (UNIT, (2,))], ids=["both", "the full one"]
)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_a_data_strip_refused_is_done_again(seed: int, offset: int, values: tuple[int, ...]) -> None:
    """The other one has a part of it; or nothing but its version, which the first durable write gives to all."""
    story, results = taken_as_they_are(seed, offset, *values)
    if results == [Result.SUCCESS]:
        for number, value in enumerate(values):
            answer = story.read(story.home, offset + number * BLOCK_SIZE)
            assert answer == (Result.SUCCESS, block_of(value)), "answered as written"
    empty(story.parity)
    story.parity.start()
    story.settle()
    audit(story.cluster)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_half_a_write_is_not_read_before_it_stays(seed: int, everywhere: bool) -> None:
    """The data strips have no space for a version in common. Should power fail before, the write is taken back."""
    story, offsets = Story(seed), (UNIT - BLOCK_SIZE, UNIT)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    story.settle()
    fill(story.second, story.parity)
    assert story.wait(ask(story, story.home, offsets[0], 2, 2)) == [Result.NO_SPACE]
    seen: list[bytes] = []
    for machine in story.cluster.machines:
        machine.node.gateway.read(story.oid, offsets[0], BLOCK_SIZE, lambda _, data: seen.append(bytes(data)))
    story.cluster.world.run_for(SECOND)
    for machine in story.cluster.machines if everywhere else [story.home]:
        machine.kill(power=True)
    empty(story.second, story.parity)
    story.cluster.start_all()
    story.settle()
    found = story.blocks(*offsets)
    assert not set(seen) - {found[0]}, "read, and then gone"
    audit(story.cluster)


def read_though_refused(seed: int) -> Story:
    """A data strip has refused a write that the others took, and that was read."""
    story = Story(seed)
    story.wait(story.write(0, 1), story.write(UNIT, 1))
    story.settle()
    fill(story.second)
    assert story.wait(story.write(UNIT, 2)) == [Result.NO_SPACE]
    assert story.blocks(UNIT) == [block_of(2)]
    return story


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_write_that_was_read_does_not_go_with_the_parity(seed: int) -> None:
    """A data strip has refused it, so the others are what the object is; then one of these rots. That is one more than
    the parity can stand: an error, and not what was there before."""
    story = read_though_refused(seed)
    story.parity.disk.copies()[strip_of(story.oid, 2)].rotten[0] = None
    for _ in range(3):
        assert {story.read(machine, UNIT)[0] for machine in story.cluster.machines} == {Result.EIO}
        assert story.blocks(0) == [block_of(1)]
        story.cluster.world.run_for(SECOND)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_write_that_was_read_waits_for_a_strip_that_is_away(seed: int) -> None:
    """The same, when the parity's node dies and comes back."""
    story = read_though_refused(seed)
    story.parity.kill()
    story.cluster.world.run_for(SECOND)
    assert {story.read(machine, UNIT)[0] for machine in (story.home, story.second)} == {Result.EIO}
    empty(story.second)
    story.parity.start()
    story.settle()
    assert story.blocks(UNIT, 0) == [block_of(2), block_of(1)]
    audit(story.cluster)
