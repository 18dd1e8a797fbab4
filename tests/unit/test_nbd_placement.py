"""Where the NBD server's threads run: together while there is room, not bound to a processor that others want."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from sheepdog.frontends.nbd import placement
from sheepdog.frontends.nbd.placement import Placement, idle_times, move, placed

STAT = """cpu  10 0 10 1000 100 0 0 0 0 0
cpu0 5 0 5 400 50 0 0 0 0 0
cpu12 5 0 5 600 50 0 0 0 0 0
intr 1 2 3
"""


@pytest.mark.parametrize(
    ("here", "used", "idle", "expected"),
    [
        (None, 0.9, {0: 0.2, 1: 0.4}, 1),
        (None, 0.9, {0: 0.05, 1: 0.0}, None),
        (0, 0.9, {0: 0.1, 1: 1.0}, 0),
        (0, 0.9, {0: 0.0, 1: 1.0}, 0),  # it fills the processor by itself: another is no better
        (0, 0.4, {0: 0.0, 1: 1.0}, 1),
        (0, 0.4, {0: 0.0, 1: 0.4}, None),
        (0, 0.4, {0: 0.0, 1: 0.0}, None),
        (0, 0.4, {}, None),
    ],
)
def test_where_there_is_room(here: int | None, used: float, idle: dict[int, float], expected: int | None) -> None:
    assert placed(here, used, idle) == expected


def test_times_of_each_processor() -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert idle_times(STAT) == {0: pytest.approx(450 * tick), 12: pytest.approx(650 * tick)}


@pytest.fixture
def other_thread() -> Iterator[int]:
    """A thread beside the test's own; all may run everywhere afterwards."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one processor only: there is nothing to choose")
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    move(allowed)
    end.set()
    thread.join()


class Scene:
    """The processors of this machine, by seconds that pass at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus = sorted(os.sched_getaffinity(0))
        self.placement = Placement()
        self._at = 0.0
        self._used = 0.0
        self._idle = dict.fromkeys(self.cpus, 0.0)
        self._steps: list[tuple[float, float]] = []
        monkeypatch.setattr(placement, "time", self)
        monkeypatch.setattr(placement, "idle_times", lambda text: dict(self._idle))

    def monotonic(self) -> float:
        return self._at

    def process_time(self) -> float:
        return self._used

    def sleep(self, seconds: float) -> None:
        if not self._steps:
            raise OSError  # the end of the scene
        used, idle = self._steps.pop(0)
        self._at += seconds
        self._used += used * seconds
        for cpu in self.cpus:
            self._idle[cpu] += (idle if cpu != self.cpus[1] else 2 * idle) * seconds

    def play(self, *steps: tuple[float, float]) -> None:
        """Each for a second: what this process uses, and for how much of it processors idle (the second one twice)."""
        self._steps = list(steps)
        self.placement.watch()


def test_threads_follow_one_another(monkeypatch: pytest.MonkeyPatch, other_thread: int) -> None:
    scene = Scene(monkeypatch)
    everywhere, second = set(scene.cpus), {scene.cpus[1]}
    full, crowd, room = (0.9, 0.0), (0.4, 0.0), (0.9, 0.3)
    idle_server = (0.1, 0.0)
    for steps, expected in (
        ((full, idle_server), everywhere),
        ((room,), second),
        ((full, full, full), second),
        ((crowd, full, crowd, full), second),  # once may be a start or an end of something
        ((crowd, idle_server), second),
        ((crowd, crowd), everywhere),
        ((crowd, full), everywhere),
        ((room,), second),
    ):
        scene.play(*steps)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other_thread) == expected


def test_who_moves_the_server_has_the_last_word(monkeypatch: pytest.MonkeyPatch, other_thread: int) -> None:
    scene = Scene(monkeypatch)
    first = {scene.cpus[0]}
    scene.play((0.9, 0.3))
    move(first)
    scene.play((0.4, 0.0), (0.4, 0.0), (0.9, 0.3))
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other_thread) == first
