"""A bar for work that takes more than a moment: on a terminal only, on stderr, gone when the work is done."""

from __future__ import annotations

import sys
import time

_QUIET_S = 1.0  # shorter work shows nothing
_STEP_S = 0.1
_WIDTH = 40


class Progress:
    """Counts bytes (or objects) up to `total`."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = max(total, 1)
        self._done = 0
        self._shown = False
        self._next = time.monotonic() + _QUIET_S
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self._done += count
        if self._terminal and (now := time.monotonic()) >= self._next:
            self._next, self._shown = now + _STEP_S, True
            share = min(self._done / self._total, 1.0)
            bar = "=" * int(share * _WIDTH)
            print(f"\r{self._title} [{bar:<{_WIDTH}}] {100 * share:5.1f}%", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Takes the bar away."""
        if self._shown:
            print("\r" + " " * (len(self._title) + _WIDTH + 12) + "\r", end="", file=sys.stderr, flush=True)
