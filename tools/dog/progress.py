"""A bar for work that takes more than a moment: on a terminal only, on stderr, gone when the work is done.

With the package rich it also tells the rate and the time that is left; without it, the share that is done.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

_QUIET_S = 1.0  # shorter work shows nothing
_STEP_S = 0.1
_WIDTH = 40


class Progress:
    """Counts bytes up to `total`. As a context, whose end takes the bar away also when the work fails."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = max(total, 1)
        self._done = 0
        self._bar: _Bar | None = None
        self._next = time.monotonic() + _QUIET_S
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.remove()
            self._bar = None

    def advance(self, count: int) -> None:
        self._done += count
        if self._terminal and (now := time.monotonic()) >= self._next:
            self._next = now + _STEP_S
            if self._bar is None:
                self._bar = _bar(self._title, self._total)
            self._bar.show(min(self._done, self._total))


class _Bar(Protocol):
    def show(self, done: int) -> None: ...

    def remove(self) -> None: ...


def _bar(title: str, total: int) -> _Bar:
    try:
        return _RichBar(title, total)
    except ImportError:
        return _PlainBar(title, total)


class _PlainBar:
    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total

    def show(self, done: int) -> None:
        share = done / self._total
        bar = "=" * int(share * _WIDTH)
        print(f"\r{self._title} [{bar:<{_WIDTH}}] {100 * share:5.1f}%", end="", file=sys.stderr, flush=True)

    def remove(self) -> None:
        print("\r" + " " * (len(self._title) + _WIDTH + 12) + "\r", end="", file=sys.stderr, flush=True)


class _RichBar:
    def __init__(self, title: str, total: int) -> None:
        """ImportError without rich."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        # What is printed meanwhile appears above the bar; but stdout goes where it was sent.
        both = sys.stdout.isatty()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=both)
        self._task = self._progress.add_task(title, total=total)
        self._progress.start()

    def show(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def remove(self) -> None:
        self._progress.stop()
