"""How fast restores go (core.pace): a window of bytes among themselves, small steps and pauses beside clients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from sheepdog.cluster.core.context import Context, Counters
from sheepdog.cluster.core.limits import (
    PULL_CHUNK_BYTES,
    PULL_FLOOR_BYTES_PER_S,
    PULL_QUIET_NS,
    PULL_SLICE_BYTES,
    PULL_WINDOW_BYTES,
    PULL_YIELD,
)
from sheepdog.cluster.core.pace import Pace

MILLISECOND = 1_000_000


class World:
    """A clock that stands still, timers that the test runs, and the pace of one node."""

    def __init__(self) -> None:
        self.now = 10 * PULL_QUIET_NS
        self.timers: list[tuple[int, Callable[[], None]]] = []
        self.counters = Counters()
        clock = SimpleNamespace(now_ns=lambda: self.now, after=lambda ns, call: self.timers.append((ns, call)))
        context = SimpleNamespace(clock=clock, counters=self.counters, probe=lambda name: None)
        self.pace = Pace(cast(Context, context))
        self.woken: list[str] = []

    def take(self, wanted: int = PULL_CHUNK_BYTES) -> int:
        return self.pace.take(wanted, self.wake)

    def wake(self) -> None:
        self.woken.append("again")

    def client(self) -> None:
        self.counters.peer_writes += 1

    def give_back(self, length: int, took_ns: int) -> None:
        begun_ns = self.now
        self.now += took_ns
        self.pace.give_back((length, begun_ns))


def test_without_clients_restores_fill_the_window() -> None:
    world = World()
    for _ in range(PULL_WINDOW_BYTES // PULL_CHUNK_BYTES):
        assert world.take() == PULL_CHUNK_BYTES
    assert world.take() == 0
    world.give_back(PULL_CHUNK_BYTES, MILLISECOND)
    assert world.woken == ["again"]
    assert world.take() == PULL_CHUNK_BYTES
    assert not world.timers


def test_beside_clients_there_is_one_slice_at_a_time_and_a_pause_after_it() -> None:
    world = World()
    world.client()
    assert world.take() == PULL_SLICE_BYTES
    assert world.take() == 0
    world.give_back(PULL_SLICE_BYTES, MILLISECOND)
    ((pause_ns, end),) = world.timers
    assert pause_ns == PULL_YIELD * MILLISECOND
    assert world.take() == 0
    assert not world.woken
    end()
    assert world.woken == ["again"]
    assert world.take() == PULL_SLICE_BYTES


def test_on_a_slow_machine_the_pause_is_shorter_than_the_floor_asks_for() -> None:
    world = World()
    world.client()
    world.take()
    least_ns = PULL_SLICE_BYTES * 1_000_000_000 // PULL_FLOOR_BYTES_PER_S
    world.give_back(PULL_SLICE_BYTES, least_ns - MILLISECOND)
    assert [pause_ns for pause_ns, _ in world.timers] == [MILLISECOND]


@pytest.mark.parametrize("where", ["here", "there"])
def test_when_clients_are_gone_it_goes_fast_again(where: str) -> None:
    world = World()
    if where == "here":
        world.client()
    else:
        world.pace.told()
    assert world.take() == PULL_SLICE_BYTES
    assert world.pace.has_clients() == (where == "here"), "what was heard of another node is not passed on"
    world.give_back(PULL_SLICE_BYTES, PULL_QUIET_NS)
    assert world.take() == PULL_CHUNK_BYTES
    assert not world.timers


def test_a_new_epoch_ends_a_pause() -> None:
    world = World()
    world.client()
    world.take()
    world.give_back(PULL_SLICE_BYTES, MILLISECOND)
    world.pace.begin()
    assert world.take() == PULL_SLICE_BYTES
    ((_, end),) = world.timers
    end()
    assert world.take() == 0, "the pause was of another epoch"
