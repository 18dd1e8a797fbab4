"""Strips here that are to be made anew, remembered durably until they are.

A stale strip looks like any other: it has a version. Once the other strips of its object have become one state without
it, with a new version (core.strip_peering), it must not be taken for one that only lacks that. So nobody gives strips a
new version before every node has written down which of its own do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import NamedTuple

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, plain_oid
from sheepdog.cluster.core.ports import Done, NodeState

_ENTRY = Struct("<QB3xIIQII")  # oid, strip + 1, version, epoch, 1: lacks a write of it
VersionOf = Callable[[ObjectId], Version | None]


class _Mark(NamedTuple):
    version: Version  # of the strip then; with a later one it was made anew
    epoch: int
    lacks_write: bool = False  # that all was proven current at the start of the epoch does not make it right


class StaleStrips:
    """Of one node."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._marks: dict[ObjectId, _Mark] = {}
        self._saved: dict[ObjectId, _Mark] = {}  # on the disk

    def load(self, version_of: VersionOf, settled: int) -> dict[ObjectId, int]:
        """The strips that are still to be made anew, with the epoch in which that was last known; but not those without
        a version, which tell by that that they are.

        What was marked by then is not stale if all was proven current in the epoch `settled`.
        """
        data = self._state.load_stale()
        whole = len(data) - len(data) % _ENTRY.size
        for oid, strip, epoch, term, counter, marked, lacks_write in _ENTRY.iter_unpack(data[:whole]):
            mark = _Mark(Version(epoch, term, counter), marked, bool(lacks_write))
            self._marks[ObjectId(oid | strip << STRIP_SHIFT)] = mark
        self._marks = self._valid(version_of, settled)
        return {strip: mark.epoch for strip, mark in self._marks.items() if version_of(strip) != NO_VERSION}

    def _valid(self, version_of: VersionOf, settled: int) -> dict[ObjectId, _Mark]:
        """A strip with an earlier version than it had is the same one: what its disk did not keep it has lost with its
        power. So is one that is being made anew, until that is on the disk, too."""
        return {
            strip: mark
            for strip, mark in self._marks.items()
            if (mark.epoch > settled or mark.lacks_write)
            and (version := version_of(strip)) is not None
            and version <= mark.version
        }

    def settle(
        self,
        decided: Callable[[ObjectId], bool],
        missing: Iterable[ObjectId],
        epoch: int,
        version_of: VersionOf,
        done: Done,
    ) -> None:
        """In `epoch` those of `missing` are not current, of all strips here that `decided` is true of; `done` when that
        is durable. Of lost objects nothing new is known: what is noted stays. Whole copies do not matter."""
        marks = {strip: mark for strip, mark in self._valid(version_of, 0).items() if not decided(strip)}
        for strip in missing:
            version = version_of(strip) if strip >> STRIP_SHIFT else None
            if version is not None and version != NO_VERSION:
                marks[strip] = _Mark(version, epoch)
        self._save(marks, done)

    def lacks_write(self, strip: ObjectId, epoch: int, version_of: VersionOf, done: Done) -> None:
        """In `epoch` the strip could not take a write: it is not current until it is made anew."""
        marks, version = self._valid(version_of, 0), version_of(strip)
        if version is not None and version != NO_VERSION:
            marks[strip] = _Mark(version, epoch, True)
        self._save(marks, done)

    def made_anew(self, strip: ObjectId, version_of: VersionOf, done: Done) -> None:
        """The strip is what the others are, durably. With a later version than it had, as nearly always, its mark is
        void by itself: all marks are saved as one, which is too much for each strip of a node that was away."""
        mark, version = self._marks.get(strip), version_of(strip)
        if mark is not None and version is not None and version <= mark.version:
            self._save({other: mark for other, mark in self._marks.items() if other != strip}, done)

    def _save(self, marks: dict[ObjectId, _Mark], done: Done) -> None:
        if marks == self._marks == self._saved:
            done(None)
            return
        self._marks = marks

        def saved(error: StoreError | None) -> None:
            if error is None:
                self._saved = marks
            done(error)

        entries = [
            _ENTRY.pack(plain_oid(strip), strip >> STRIP_SHIFT, *mark.version, mark.epoch, mark.lacks_write)
            for strip, mark in marks.items()
        ]
        self._state.save_stale(b"".join(entries), saved)

    def clear(self) -> None:
        """The cluster was formatted: epochs begin again."""
        if self._marks:
            self._marks = {}
            self._state.save_stale(b"", lambda _: None)
