"""Strips here that are to be made anew, remembered durably until they are.

A stale strip looks like any other: it has a version. Once the other strips of its object have become one state without
it, with a new version (core.strip_peering), it must not be taken for one that only lacks that. So nobody gives strips a
new version before every node has written down which of its own do not count.

Of what has no version, and nobody here had a current copy or strip of, it is remembered what this node told. In such an
epoch nothing was written, and who was there has to be able to say so after a restart (core.past).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from struct import Struct
from types import MappingProxyType
from typing import NamedTuple

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, plain_oid
from sheepdog.cluster.core.ports import Done, NodeState
from sheepdog.cluster.core.standing import Lack

_ENTRY = Struct("<QB3xIIQII")  # oid, strip + 1, version or lack, epoch, kind
_TO_BE_MADE, _LACKS_WRITE, _LOST = range(3)
_NONE: Mapping[ObjectId, Lack] = MappingProxyType({})
VersionOf = Callable[[ObjectId], Version | None]


class _Mark(NamedTuple):
    version: Version  # of the strip then; with a later one it was made anew
    epoch: int
    lacks_write: bool = False  # that all was proven current at the start of the epoch does not make it right


class _Loss(NamedTuple):
    epoch: int
    lack: Lack  # what is known here of the copy or strip, which has no version


class StaleStrips:
    """Of one node."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._marks: dict[ObjectId, _Mark] = {}
        self._losses: dict[ObjectId, _Loss] = {}
        self._wanted = self._saved = b""  # the second is on the disk

    def load(self, version_of: VersionOf, settled: int) -> dict[ObjectId, int]:
        """The strips that are still to be made anew, with the epoch in which that was last known; but not those without
        a version, which tell by that that they are.

        What was marked by then is not stale if all was proven current in the epoch `settled`.
        """
        data = self._wanted = self._saved = self._state.load_stale()
        whole = len(data) - len(data) % _ENTRY.size
        for oid, strip, epoch, term, counter, marked, kind in _ENTRY.iter_unpack(data[:whole]):
            copy = ObjectId(oid | strip << STRIP_SHIFT)
            if kind == _LOST:
                self._losses[copy] = _Loss(marked, Lack(epoch, term, counter))
            else:
                self._marks[copy] = _Mark(Version(epoch, term, counter), marked, kind == _LACKS_WRITE)
        self._marks = self._valid(version_of, settled)
        self._losses = {copy: loss for copy, loss in self._losses.items() if loss.epoch > settled}
        return {strip: mark.epoch for strip, mark in self._marks.items() if version_of(strip) != NO_VERSION}

    def losses(self, version_of: VersionOf) -> dict[ObjectId, Lack]:
        """What was known, after `load`, of copies and strips without a version of which nobody had a current one."""
        return {copy: loss.lack for copy, loss in self._losses.items() if version_of(copy) == NO_VERSION}

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
        lost: Mapping[ObjectId, Lack] = _NONE,
    ) -> None:
        """In `epoch` those of `missing` are not current, of all strips here that `decided` is true of; `done` when that
        is durable. Whole copies do not matter.

        Nobody has those of `lost`, copies and strips: what is noted of their versions stays.
        """
        losses = {copy: loss for copy, loss in self._losses.items() if not decided(copy)}
        losses.update((copy, _Loss(epoch, lack)) for copy, lack in lost.items() if version_of(copy) == NO_VERSION)
        marks = {strip: mark for strip, mark in self._valid(version_of, 0).items() if not decided(strip)}
        for strip in missing:
            version = version_of(strip) if strip >> STRIP_SHIFT else None
            if version is not None and version != NO_VERSION:
                marks[strip] = _Mark(version, epoch)
        self._save(marks, losses, done)

    def lacks_write(self, strip: ObjectId, epoch: int, version_of: VersionOf, done: Done) -> None:
        """In `epoch` the strip could not take a write: it is not current until it is made anew."""
        marks, version = self._valid(version_of, 0), version_of(strip)
        if version is not None and version != NO_VERSION:
            marks[strip] = _Mark(version, epoch, True)
        self._save(marks, self._losses, done)

    def went_bad(self, copies: Iterable[ObjectId], done: Done) -> None:
        """They were current, so they have been created anew since nobody had them. To be called before it is noted that
        something here went bad: that is saved behind this."""
        losses = dict(self._losses)
        for copy in copies:
            losses.pop(copy, None)
        if len(losses) < len(self._losses):
            self._save(self._marks, losses, done)

    def made_anew(self, strip: ObjectId, version_of: VersionOf, done: Done) -> None:
        """The strip is what the others are, durably. With a later version than it had, as nearly always, its mark is
        void by itself: all marks are saved as one, which is too much for each strip of a node that was away."""
        mark, version = self._marks.get(strip), version_of(strip)
        if mark is not None and version is not None and version <= mark.version:
            marks = {other: mark for other, mark in self._marks.items() if other != strip}
            self._save(marks, self._losses, done)

    def _save(self, marks: dict[ObjectId, _Mark], losses: dict[ObjectId, _Loss], done: Done) -> None:
        self._marks, self._losses = marks, losses
        entries = [_entry(strip, mark.version, mark.epoch, mark.lacks_write) for strip, mark in marks.items()]
        entries += [_entry(copy, loss.lack, loss.epoch, _LOST) for copy, loss in losses.items()]
        data = b"".join(entries)
        if data == self._wanted == self._saved:
            done(None)
            return
        self._wanted = data

        def saved(error: StoreError | None) -> None:
            if error is None:
                self._saved = data
            done(error)

        self._state.save_stale(data, saved)

    def clear(self) -> None:
        """The cluster was formatted: epochs begin again."""
        if self._marks or self._losses:
            self._marks, self._losses, self._wanted = {}, {}, b""
            self._state.save_stale(b"", lambda _: None)


def _entry(copy: ObjectId, fields: Version | Lack, epoch: int, kind: int) -> bytes:
    return _ENTRY.pack(plain_oid(copy), copy >> STRIP_SHIFT, *fields, epoch, kind)
