"""Slow paths in several steps, written one below the other: administration, reclaim, inode writes.

A script is a generator that yields *steps*: functions that take a callback and call it once, at once or later.
It is resumed with what the callback got. Anything may have changed meanwhile: each step must say what it relies on.
The hot path does not use this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Step: TypeAlias = Callable[[Callable[..., None]], None]
Script: TypeAlias = Generator[Step, Any, T]

_NOTHING = object()


def run(script: Script[T], done: Callable[[T], None]) -> None:
    """Runs a script to its end; `done` gets what it returns. Steps that end at once cost no stack."""
    pending: Any = None
    running = False

    def resume(*values: Any) -> None:
        nonlocal pending
        pending = values[0] if len(values) == 1 else values
        if not running:
            advance()

    def advance() -> None:
        nonlocal pending, running
        while pending is not _NOTHING:
            value, pending = pending, _NOTHING
            running = True
            try:
                step = script.send(value)
            except StopIteration as stop:
                running = False
                done(stop.value)
                return
            step(resume)
            running = False

    advance()


def gather(steps: Iterable[Step], limit: int) -> Step:
    """All steps, at most `limit` at a time; the callback gets the list of their results."""

    def together(done: Callable[..., None]) -> None:
        todo = list(enumerate(steps))
        todo.reverse()
        results: list[Any] = [None] * len(todo)
        left = len(todo)
        if not left:
            done([])
            return
        starting = False

        def start() -> None:
            nonlocal starting
            if starting:
                return
            starting = True
            while todo and left - len(todo) < limit:
                index, step = todo.pop()
                step(ended(index))
            starting = False

        def ended(index: int) -> Callable[..., None]:
            def one(*values: Any) -> None:
                nonlocal left
                results[index] = values[0] if len(values) == 1 else values
                left -= 1
                if left:
                    start()
                else:
                    done(results)

            return one

        start()

    return together
