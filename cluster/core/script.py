"""Slow paths in several steps, written one below the other: administration, reclaim, inode writes.

A script is a generator that yields *steps*: functions that take a callback and call it once, at once or later.
It is resumed with what the callback got. Anything may have changed meanwhile: each step must say what it relies on.
The hot path does not use this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Step: TypeAlias = Callable[[Callable[..., None]], None]
Script: TypeAlias = Generator[Step, Any, T]

_NOTHING = object()


def run(script: Script[T], done: Callable[[T], None]) -> None:
    """Runs a script to its end; `done` gets what it returns. Steps that end at once cost no stack."""
    _Run(script, done).advance()


class _Run:
    """A script under way."""

    __slots__ = ("_done", "_pending", "_running", "_script")

    def __init__(self, script: Script[Any], done: Callable[[Any], None]) -> None:
        self._script = script
        self._done = done
        self._pending: Any = None
        self._running = False

    def _resume(self, *values: Any) -> None:
        self._pending = values[0] if len(values) == 1 else values
        if not self._running:
            self.advance()

    def advance(self) -> None:
        while self._pending is not _NOTHING:
            value, self._pending = self._pending, _NOTHING
            self._running = True
            try:
                step = self._script.send(value)
            except StopIteration as stop:
                self._running = False
                self._done(stop.value)
                return
            step(self._resume)
            self._running = False


def gather(steps: Iterable[Step], limit: int) -> Step:
    """All steps, at most `limit` at a time; the callback gets the list of their results."""
    return lambda done: _Gathering(steps, limit, done).start()


class _Gathering:
    """Steps of which some run at a time."""

    __slots__ = ("_done", "_left", "_limit", "_results", "_starting", "_todo")

    def __init__(self, steps: Iterable[Step], limit: int, done: Callable[..., None]) -> None:
        self._todo = list(enumerate(steps))
        self._todo.reverse()
        self._limit = limit
        self._done = done
        self._results: list[Any] = [None] * len(self._todo)
        self._left = len(self._todo)
        self._starting = False

    def start(self) -> None:
        if not self._results:
            self._done([])
        if self._starting:
            return
        self._starting = True
        while self._todo and self._left - len(self._todo) < self._limit:
            index, step = self._todo.pop()
            step(partial(self._ended, index))
        self._starting = False

    def _ended(self, index: int, *values: Any) -> None:
        self._results[index] = values[0] if len(values) == 1 else values
        self._left -= 1
        if self._left:
            self.start()
        else:
            self._done(self._results)
