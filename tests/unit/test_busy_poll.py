"""When a daemon looks for the next event awake, and when it sleeps."""

from __future__ import annotations

import itertools

import pytest

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host.loop import BUSY_POLL_S, busy_poll_s
from sheepdog.cluster.host.turn import LEAST_REST_S, MOST_REST_S, BusyPoll

WINDOW_S = 200e-6
LOOK_S = 2e-6
EVENT = [(5, 1)]


class World:
    """A clock, what comes when, and others that may keep the processor."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.now = 100.0
        self.event_at = 0.0
        self.kept_s = 0.0  # by others, each time they are offered the processor
        self.looks = 0
        self.sleeps: list[float | None] = []
        self.busy = BusyPoll(window_s, lambda: self.now, self.give_way)

    def give_way(self) -> None:
        self.now += self.kept_s

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        self.now += LOOK_S
        if timeout == 0:
            self.looks += 1
        else:
            self.sleeps.append(timeout)
            self.now = max(self.now, self.event_at if timeout is None else min(self.event_at, self.now + timeout))
        return EVENT if self.now >= self.event_at else []

    def wait(self, gap_s: float, timeout: float | None = None) -> list[tuple[int, int]]:
        """For an event after so long."""
        self.event_at = self.now + gap_s
        return self.busy.wait(self.poll, timeout, 1)


def test_short_waits_are_spent_awake_from_the_second_one_on() -> None:
    world = World()
    for _ in range(10):
        assert world.wait(WINDOW_S / 2) == EVENT
    assert len(world.sleeps) == 1
    assert world.looks >= 9 * 10


def test_who_waits_long_sleeps_at_once() -> None:
    world = World()
    for _ in range(10):
        assert world.wait(5 * WINDOW_S) == EVENT
    assert len(world.sleeps) == 10
    assert world.looks == 0


def test_a_search_ends_with_its_window_and_the_next_wait_begins_asleep() -> None:
    world = World()
    world.wait(WINDOW_S / 2)
    assert world.wait(5 * WINDOW_S) == EVENT
    looks = world.looks
    assert 0 < looks <= WINDOW_S / LOOK_S + 1
    world.wait(WINDOW_S / 2)
    assert world.looks == looks
    assert len(world.sleeps) == 3


def test_a_timer_is_not_searched_over() -> None:
    world = World()
    world.wait(WINDOW_S / 2)
    before = world.now
    assert world.wait(1.0, timeout=WINDOW_S / 4) == []
    assert world.now - before <= WINDOW_S / 4 + 2 * LOOK_S
    world = World()
    world.wait(WINDOW_S / 2)
    before = world.now
    assert world.wait(1.0, timeout=0.01) == []
    assert world.now - before == pytest.approx(0.01, abs=3 * LOOK_S)


def test_what_is_there_is_taken_without_giving_way() -> None:
    world = World()
    world.wait(WINDOW_S / 2)
    world.kept_s = 1.0
    before = world.now
    assert world.wait(0.0) == EVENT
    assert world.now - before < 1.0


def test_who_loses_the_processor_sleeps_for_a_time_that_grows() -> None:
    world = World()
    world.kept_s = 3e-3
    losses = []
    for _ in range(20_000):
        looks = world.looks
        world.wait(WINDOW_S / 2)
        if world.looks > looks:
            losses.append(world.now)
            assert world.looks == looks + 1
    rests = [after - before for before, after in itertools.pairwise(losses)]
    assert rests[0] == pytest.approx(LEAST_REST_S, rel=0.5)
    assert all(after > 1.5 * before for before, after in itertools.pairwise(rests[:6]))
    assert max(rests) <= MOST_REST_S * 1.1


def test_a_loss_after_a_long_peace_is_the_first_again() -> None:
    world = World()
    for peace_s in (0.0, 10.0):
        world.now += peace_s
        world.kept_s = 0.0
        world.wait(WINDOW_S / 2)
        world.kept_s = 3e-3
        world.wait(WINDOW_S / 2)
        world.kept_s = 0.0
        world.now += 1.1 * LEAST_REST_S
        looks = world.looks
        world.wait(WINDOW_S / 2)
        world.wait(WINDOW_S / 2)
        assert world.looks > looks


def test_a_window_of_nothing_always_sleeps() -> None:
    world = World(0.0)
    for _ in range(5):
        world.wait(0.0)
    assert len(world.sleeps) == 5
    assert world.looks == 0


def test_the_environment_says_how_long() -> None:
    assert busy_poll_s({}) == busy_poll_s({"SHEEPDOG_BUSY_POLL_US": ""}) == BUSY_POLL_S
    assert busy_poll_s({"SHEEPDOG_BUSY_POLL_US": "0"}) == 0
    assert busy_poll_s({"SHEEPDOG_BUSY_POLL_US": "50"}) == 50e-6
    for text in ("-1", "1.5", "x", "10001", "9" * 5000, "²"):
        with pytest.raises(UsageError, match="is not a number of microseconds up to 10000"):
            busy_poll_s({"SHEEPDOG_BUSY_POLL_US": text})
