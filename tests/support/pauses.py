"""How long this process was kept from running: what a busy machine adds to a time that a test measures."""

from __future__ import annotations

import threading
import time
from types import TracebackType

STEP_SECONDS = 0.01


class Pauses:
    """`longest`: how much later than asked for a sleeping thread has woken, at most, since the `with` began."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(STEP_SECONDS)
            self.longest = max(self.longest, time.monotonic() - began - STEP_SECONDS)

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
