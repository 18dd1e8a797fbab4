"""Clients that ask for one thing again and again and write down when they were answered."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.door import Door
from tests.support.pauses import Pauses
from tests.support.processes import wait_until

RETRY_SECONDS = 0.05
ANSWER_SECONDS = 120.0  # requests wait for as long as the membership is in doubt
BUSY_PAUSES = 2  # the sheep that answers and the test that sees it may each be kept from running for so long


class Success(NamedTuple):
    """When a request was sent that succeeded, and when its answer was there (monotonic seconds)."""

    began: float
    ended: float


class Watch:
    """Sends one request over and over from a thread of its own, by a node's socket. Call `close` in every case."""

    def __init__(self, address: Path, request: bytes) -> None:
        self.successes: list[Success] = []
        self._address = address
        self._request = request
        self._over = False
        self._door: Door | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            with contextlib.suppress(OSError), Door(self._address) as self._door:
                self._door.socket.settimeout(ANSWER_SECONDS)
                self._ask_on(self._door)
            time.sleep(RETRY_SECONDS)

    def _ask_on(self, door: Door) -> None:
        while not self._over:
            began = time.monotonic()
            if door.ask(self._request).result == 0:
                self.successes.append(Success(began, time.monotonic()))

    def goes_on(self, seconds: float = ANSWER_SECONDS) -> float:
        """Waits for the next success of a request that is sent from now on; when it was answered."""
        now = time.monotonic()
        wait_until(lambda: bool(self.since(now)), seconds, "requests are answered")
        return self.since(now)[0].ended

    def since(self, moment: float) -> list[Success]:
        """Successes of requests that were sent at `moment` or later."""
        return [success for success in list(self.successes) if success.began >= moment]

    @property
    def last(self) -> float:
        """When the latest success was there."""
        return self.successes[-1].ended

    def check_ended(self, deadline: float, step_seconds: float, pauses: Pauses) -> None:
        """The latest success came before `deadline`, but for `step_seconds` and what a busy machine was measured to
        add."""
        late = self.last - deadline
        print(f"answered until {late:.2f} s after the end of the lease; the longest pause was {pauses.longest:.2f} s")
        assert late < step_seconds + BUSY_PAUSES * pauses.longest, "answered without a membership"

    def close(self) -> None:
        self._over = True
        door = self._door
        if door is not None:
            with contextlib.suppress(OSError):
                door.socket.shutdown(2)  # wakes the thread
        self._thread.join(ANSWER_SECONDS)
