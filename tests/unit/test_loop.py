"""The end of a turn comes after everything that was ready and before the loop waits; the clock keeps its promises."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sheepdog.cluster.host import loop as loop_module
from sheepdog.cluster.host.loop import Collector, TurnLoop, new_loop
from sheepdog.cluster.host.turn import HostClock, Turn

MS = 1_000_000


class World:
    def __init__(self) -> None:
        self.logged: list[str] = []
        self.loop: TurnLoop = new_loop(lambda level, text: self.logged.append(text))
        self.turn = Turn(self.loop)
        self.happened: list[str] = []

    def run(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


def test_the_end_of_a_turn_follows_everything_that_was_ready(world: World) -> None:
    pairs = [socket.socketpair() for _ in range(5)]

    def readable(number: int) -> None:
        pairs[number][0].recv(10)
        world.happened.append(f"read {number}")
        if number % 2 == 0:
            world.turn.at_end(lambda: world.happened.append(f"end {number}"))

    for number, (ours, theirs) in enumerate(pairs):
        world.loop.add_reader(ours, readable, number)
        theirs.send(b"x")
    world.run(0.02)
    for ours, theirs in pairs:
        world.loop.remove_reader(ours)
        ours.close()
        theirs.close()
    assert sorted(world.happened[:5]) == [f"read {number}" for number in range(5)]
    assert sorted(world.happened[5:]) == ["end 0", "end 2", "end 4"]
    assert world.turn.count == 1


def test_calls_may_ask_for_more_of_them_in_the_same_turn(world: World) -> None:
    def chain(left: int) -> None:
        world.happened.append(str(left))
        if left:
            world.turn.at_end(lambda: chain(left - 1))

    world.loop.call_soon(world.turn.at_end, lambda: chain(3))
    world.loop.call_later(0.01, world.happened.append, "timer")
    world.run(0.03)
    assert world.happened == ["3", "2", "1", "0", "timer"]
    assert world.turn.count == 1


def test_calls_without_end_leave_room_for_others(world: World) -> None:
    def for_ever() -> None:
        world.turn.at_end(for_ever)

    world.turn.at_end(for_ever)
    world.loop.call_later(0.01, world.happened.append, "timer")
    world.run(0.02)
    assert world.happened == ["timer"]


def test_what_is_ready_comes_before_a_call_that_looks_for_it_and_nothing_else_is_waited_for(world: World) -> None:
    ours, theirs = socket.socketpair()
    left = 3

    def readable() -> None:
        ours.recv(1)
        world.happened.append("read")
        world.turn.at_end(begin)

    def begin() -> None:
        nonlocal left
        left -= 1
        if left:
            theirs.send(b"x")
        world.turn.after_look(lambda: world.happened.append("looked"))

    world.loop.add_reader(ours, readable)
    theirs.send(b"x")
    before = time.monotonic()
    world.loop.call_later(0.01, world.happened.append, "timer")
    world.run(0.05)
    assert world.happened == ["read", "read", "looked", "read", "looked", "looked", "timer"]
    assert time.monotonic() - before < 1.0
    world.loop.remove_reader(ours)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("how", ["soon", "later", "task", "future", "stop"])
def test_what_the_end_of_a_turn_schedules_is_not_slept_over(world: World, how: str) -> None:
    future: asyncio.Future[None] = world.loop.create_future()

    async def task() -> None:
        future.set_result(None)

    def end() -> None:
        if how == "soon":
            world.loop.call_soon(future.set_result, None)
        elif how == "later":
            world.loop.call_later(0.01, future.set_result, None)
        elif how == "task":
            world.happened.append(repr(world.loop.create_task(task())))
        elif how == "future":
            future.set_result(None)
        else:
            world.loop.stop()

    world.loop.call_soon(world.turn.at_end, end)
    guard = world.loop.call_later(5.0, world.loop.stop)
    before = time.monotonic()
    if how == "stop":
        world.loop.run_forever()
    else:
        world.loop.run_until_complete(future)
    assert time.monotonic() - before < 2.0
    guard.cancel()


def test_one_broken_call_does_not_stop_the_others(world: World) -> None:
    def broken() -> None:
        raise ValueError("planted")

    world.turn.at_end(broken)
    world.turn.at_end(lambda: world.happened.append("other"))
    world.run(0)
    assert world.happened == ["other"]
    assert len(world.logged) == 1
    assert "planted" in world.logged[0]


def test_a_reader_that_always_has_more_leaves_room_for_asyncio(world: World) -> None:
    """Its own timers, its own descriptors (another thread's call), and what a reader schedules."""
    ours, theirs = socket.socketpair()
    theirs.send(b"x")  # never received: ready in every turn
    turns: list[int] = []
    reached: set[str] = set()

    def readable() -> None:
        turns.append(0)
        if len(turns) == 3:
            world.loop.call_soon(reached.add, "scheduled by a reader")

    def elsewhere() -> None:
        time.sleep(0.01)
        world.loop.call_soon_threadsafe(reached.add, "from a thread")

    world.loop.add_reader(ours, readable)
    world.loop.call_later(0.01, reached.add, "timer")
    thread = threading.Thread(target=elsewhere)
    thread.start()
    world.run(0.1)
    thread.join()
    assert world.loop.remove_reader(ours)
    assert not world.loop.remove_reader(ours)
    ours.close()
    theirs.close()
    assert reached == {"scheduled by a reader", "from a thread", "timer"}
    assert len(turns) > 10


@pytest.mark.parametrize("how", ["soon", "later"])
def test_what_a_reader_schedules_is_not_slept_over(world: World, how: str) -> None:
    ours, theirs = socket.socketpair()
    future: asyncio.Future[None] = world.loop.create_future()

    def readable() -> None:
        ours.recv(10)
        if how == "soon":
            world.loop.call_soon(future.set_result, None)
        else:
            world.loop.call_later(0.01, future.set_result, None)

    world.loop.add_reader(ours, readable)
    theirs.send(b"x")
    guard = world.loop.call_later(5.0, world.loop.stop)  # the only timer: five seconds of sleep if we forget
    before = time.monotonic()
    world.loop.run_until_complete(future)
    assert time.monotonic() - before < 2.0
    guard.cancel()
    world.loop.remove_reader(ours)
    ours.close()
    theirs.close()


def test_another_threads_call_wakes_the_loop(world: World) -> None:
    """It comes through a descriptor of asyncio's own."""
    future: asyncio.Future[None] = world.loop.create_future()

    def elsewhere() -> None:
        time.sleep(0.05)
        world.loop.call_soon_threadsafe(future.set_result, None)

    guard = world.loop.call_later(5.0, world.loop.stop)
    thread = threading.Thread(target=elsewhere)
    before = time.monotonic()
    thread.start()
    world.loop.run_until_complete(future)
    assert time.monotonic() - before < 4.0
    thread.join()
    guard.cancel()


def test_readers_may_remove_each_other_and_break(world: World) -> None:
    pairs = [socket.socketpair() for _ in range(3)]

    def first_of_two(number: int) -> None:
        world.happened.append(f"read {number}")
        for ours, _ in pairs[:2]:
            world.loop.remove_reader(ours)

    def broken() -> None:
        world.loop.remove_reader(pairs[2][0])
        raise ValueError("planted")

    for number, (ours, theirs) in enumerate(pairs[:2]):
        world.loop.add_reader(ours, first_of_two, number)
        theirs.send(b"x")
    world.loop.add_reader(pairs[2][0], broken)
    pairs[2][1].send(b"x")
    world.run(0.02)
    for pair in pairs:
        for end in pair:
            end.close()
    assert len(world.happened) == 1
    assert len(world.logged) == 1
    assert "planted" in world.logged[0]


def test_a_descriptor_that_was_closed_first_can_be_used_again(world: World) -> None:
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    world.loop.add_reader(number, world.happened.append, "old")
    ours.close()
    world.loop.remove_reader(number)
    ours, again = socket.socketpair()
    assert ours.fileno() == number
    world.loop.add_reader(number, lambda: world.happened.append(str(ours.recv(10))))
    again.send(b"x")
    world.run(0.02)
    world.loop.remove_reader(number)
    for end in (ours, again, theirs):
        end.close()
    assert world.happened == ["b'x'"]


def test_clock(world: World) -> None:
    clock = HostClock(world.loop)
    assert abs(clock.wall_ns() - time.time_ns()) < 1_000 * MS
    before = clock.now_ns()
    timers = [clock.after(20 * MS, lambda: world.happened.append(f"{clock.now_ns() - before}"))]
    timers.append(clock.after(10 * MS, lambda: world.happened.append("cancelled")))
    timers[1].cancel()
    world.run(0.05)
    assert len(world.happened) == 1
    assert int(world.happened[0]) >= 20 * MS
    for timer in timers:
        timer.cancel()  # also after it fired


def test_collector_runs_when_idle_and_gives_the_policy_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "COLLECT_CHECK_S", 0.01)
    monkeypatch.setattr(loop_module, "COLLECT_FULL_CHECKS", 3)
    collected: list[int] = []

    def seen(phase: str, info: dict[str, int]) -> None:
        collected.append(info["generation"])

    collector = Collector(world.loop, world.turn)
    collector.start()
    try:
        assert not gc.isenabled()
        gc.callbacks.append(seen)
        world.run(0.1)
        assert 2 in collected
    finally:
        gc.callbacks.remove(seen)
        collector.stop()
    assert gc.isenabled()


def test_descriptors_never_wait_for_a_larger_table() -> None:
    """With threads the kernel's growing of it is 10 ms and more in the midst of a request."""
    script = """
import os, resource
from sheepdog.cluster.host.loop import DESCRIPTORS, prepare_process
prepare_process(lambda level, text: None)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("FDSize:"))
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
assert size >= min(limit, DESCRIPTORS), (size, limit)
assert len(os.listdir("/proc/self/fd")) < 10
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
