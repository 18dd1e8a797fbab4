"""Parts of strips that were asked for, as they come.

A class each, not functions within each other: compiled, those would keep the bytes until cycles are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import ReadDone
from sheepdog.cluster.core.striping import Piece, gather


class Pieces:
    """Parts of strips as they come; `done` gets them as one when all are here, or the last error."""

    __slots__ = ("_count", "_done", "_error", "_found", "_length", "_parts")

    def __init__(self, parts: Sequence[Piece], count: int, length: int, done: ReadDone) -> None:
        self._parts = parts
        self._count = count
        self._length = length
        self._done = done
        self._found: dict[int, tuple[int, Buffer]] = {}
        self._error: StoreError | None = None

    def got(self, strip: int, at: int, data: Buffer | StoreError) -> None:
        if isinstance(data, StoreError):
            self._error = data
            self._found[strip] = at, b""
        else:
            self._found[strip] = at, data
        if len(self._found) == self._count:
            self._done(self._error if self._error is not None else gather(self._parts, self._found, self._length))


class Fetches:
    """Strips asked for, `wanted` at a time: for each that cannot be read another one, until so many are here."""

    __slots__ = ("_done", "_fetch", "_have", "_left", "_under_way", "_wanted")

    def __init__(
        self,
        left: list[int],
        wanted: int,
        fetch: Callable[[int, ReadDone], None],
        done: Callable[[dict[int, Buffer]], None],
    ) -> None:
        """`done` is called once, with bytes by strip; with fewer than `wanted` when no more can be read."""
        self._left = left
        self._wanted = wanted
        self._fetch = fetch
        self._done: Callable[[dict[int, Buffer]], None] | None = done
        self._have: dict[int, Buffer] = {}
        self._under_way = 0

    def go_on(self) -> None:
        while self._left and len(self._have) + self._under_way < self._wanted:
            strip = self._left.pop(0)
            self._under_way += 1
            self._fetch(strip, partial(self._arrived, strip))
        if self._done is not None and (len(self._have) == self._wanted or not self._under_way):
            done, self._done = self._done, None
            done(self._have)

    def _arrived(self, strip: int, data: Buffer | StoreError) -> None:
        self._under_way -= 1
        if not isinstance(data, StoreError):
            self._have[strip] = data
        self.go_on()
