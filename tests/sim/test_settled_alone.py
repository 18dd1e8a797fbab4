"""Coded objects of which power fails everywhere while the nodes note, one after the other, that all is current: what
was acknowledged as durable is read again, whoever has noted it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.sim.test_refused_strips import UNIT, Story

from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.world import SECOND

OFFSETS = tuple(strip * UNIT + block * BLOCK_SIZE for strip in range(4) for block in range(2))  # of each data strip


def read_after_one_has_noted(seed: int) -> list[tuple[int, bytes]]:
    """4:2; one of the six nodes ends, and power fails when the first of the others has noted the epoch without it."""
    story = Story(seed, 6)
    assert story.wait(*(story.write(offset, 1) for offset in OFFSETS)) == [0] * len(OFFSETS)
    story.settle()  # all strips have the version of the last write, on no disk where nothing was synced since
    away, *left = story.cluster.machines[seed % 6 :] + story.cluster.machines[: seed % 6]
    epoch = away.node.context.epoch
    away.kill()
    story.cluster.world.run_until(
        lambda: any(machine.state.proven.settled > epoch for machine in left), 10 * SECOND, "one has noted it"
    )
    for machine in left:
        machine.kill(power=True)
    story.cluster.start_all()
    story.cluster.world.run_for(10 * SECOND)  # where the object is lost it does not get healthy
    return [(result, data[:1]) for result, data in (story.read(story.home, offset) for offset in OFFSETS)]


WRITTEN = [(0, b"\x01")] * len(OFFSETS)


@pytest.mark.parametrize("seed", range(18))
def test_durable_blocks_are_read_again(seed: int) -> None:
    assert read_after_one_has_noted(seed) == WRITTEN


def test_they_would_not_if_what_was_told_had_not_been_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug."""

    def at_once(_: Copies, durable: Callable[[], None]) -> None:
        durable()

    monkeypatch.setattr(Copies, "when_durable", at_once)
    assert any(read_after_one_has_noted(seed) != WRITTEN for seed in range(18))
