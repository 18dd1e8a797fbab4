"""Writes of coded objects that strips did not take: which strips lack what, and what has to be taken back.

A strip that refuses a write is what it was, and takes no later one (core.strip_replica): of a row of writes it lacks
all from the first that it refused. The others can stay what they are as long as they are enough to decode; the strip is
made anew then. If they are too few, writes are taken back (core.take_back), as few as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.messages import Flag

if TYPE_CHECKING:
    from sheepdog.cluster.core.home_writes import Write


class Refusals:
    """Of the objects of one home, in one epoch, that are not whole. Strips are named by their index."""

    def __init__(self, strip_on: Callable[[int, ObjectId], int | None]) -> None:
        """`strip_on` tells which strip of an object belongs on a member."""
        self._strip_on = strip_on
        self._lacking: dict[ObjectId, dict[int, Version]] = {}  # the first write refused; NO_VERSION: one that stays
        self._unread: dict[ObjectId, dict[int, None]] = {}  # strips of which some bytes may be gone or rotten
        self._uneven: dict[ObjectId, dict[int, None]] = {}  # strips that only could not be brought level
        self._void: dict[ObjectId, Version] = {}  # the first write that cannot stay, whoever has it

    def failed(self, write: Write, member: int, result: int) -> None:
        """A member could not apply a write to its strip."""
        strip = self._strip_on(member, write.submission.oid)
        if strip is not None:
            if write.failed is None:
                write.failed = {}
            write.failed[strip] = result

    def ended(self, write: Write) -> None:
        """All strips have answered; in the order of writes."""
        oid, failed = write.submission.oid, write.failed
        if write.submission.flags & Flag.REMOVE:
            self.forget(oid)
        elif failed is not None and not write.fresh:
            lacking = self._lacking.setdefault(oid, {})
            for strip, result in failed.items():
                lacking.setdefault(strip, write.version)
                if result != Result.NO_SPACE:
                    self._unread.setdefault(oid, {})[strip] = None
            if not write.strips & ~sum(1 << strip for strip in failed):
                self.void(oid, write.version)  # nobody has it, so nobody lacks it

    def void(self, oid: ObjectId, version: Version) -> None:
        """This write, and what is behind it, cannot stay."""
        self._void[oid] = min(version, self._void.get(oid, version))

    def is_void(self, oid: ObjectId) -> bool:
        """Some write of the object is yet to be taken back that cannot stay."""
        return oid in self._void

    def stayed_behind(self, oid: ObjectId, member: int) -> None:
        """A strip could not be given the version of a write that did not touch it."""
        strip = self._strip_on(member, oid)
        if strip is not None:
            self._uneven.setdefault(oid, {})[strip] = None

    def useless(self, oid: ObjectId, strip: int) -> None:
        """The bytes of the strip are gone or rotten."""
        if oid in self._uneven:
            self._uneven[oid].pop(strip, None)
        if oid in self._lacking:
            self._unread.setdefault(oid, {})[strip] = None

    def lost(self, oid: ObjectId, member: int) -> None:
        """The strip of a member went with its disk."""
        strip = self._strip_on(member, oid)
        if strip is not None:
            self.useless(oid, strip)

    def stay(self, oid: ObjectId) -> None:
        """The writes that strips lack are going to be read: they are not taken back any more."""
        if oid in self._lacking:
            self._lacking[oid] = dict.fromkeys(self._lacking[oid], NO_VERSION)

    def taken_back(self, oid: ObjectId, cut: Version, failed: Sequence[int]) -> list[int]:
        """All strips but `failed`, and those that lack an earlier write, are what they were before the write `cut`.
        Returns those that are right again."""
        self._void.pop(oid, None)
        again, bad = self._uneven.pop(oid, {}), self._unread.get(oid, {})
        lacking = self._lacking.setdefault(oid, {})
        for strip in [strip for strip, first in lacking.items() if first >= cut]:
            del lacking[strip]
            again[strip] = None
        lacking.update((strip, NO_VERSION) for strip in failed)
        return [strip for strip in again if strip not in bad and strip not in lacking]

    def restored(self, oid: ObjectId, strip: int) -> None:
        """The strip has all that the object is."""
        for strips in (self._lacking.get(oid), self._uneven.get(oid), self._unread.get(oid)):
            if strips is not None:
                strips.pop(strip, None)

    def forget(self, oid: ObjectId) -> None:
        """All strips are equal, or the object is gone."""
        self._lacking.pop(oid, None)
        self._unread.pop(oid, None)
        self._uneven.pop(oid, None)
        self._void.pop(oid, None)

    def known(self, oid: ObjectId) -> list[int]:
        """Strips that do not have all, or not its version."""
        return list({**self._lacking.get(oid, {}), **self._uneven.get(oid, {})})

    def uneven(self, oid: ObjectId) -> list[int]:
        """Strips that lack only a version."""
        lacking = self._lacking.get(oid, {})
        return [strip for strip in self._uneven.get(oid, {}) if strip not in lacking]

    def lacks_before(self, oid: ObjectId, strip: int, cut: Version) -> bool:
        """The strip lacks a write that is not taken back with `cut`."""
        first = self._lacking.get(oid, {}).get(strip)
        return first is not None and first < cut

    def cut(self, oid: ObjectId, needed: int, strips: Sequence[int]) -> Version | None:
        """The first write to be taken back, so that `needed` of `strips` have all that is before it, or as many as can
        be; None if all can stay."""
        lacking, void = self._lacking.get(oid, {}), self._void.get(oid)
        cuts = sorted(first for first in lacking.values() if first != NO_VERSION and (void is None or first <= void))
        cut: Version | None = void
        while sum(strip not in lacking or (cut is not None and lacking[strip] >= cut) for strip in strips) < needed:
            if not cuts:
                break
            cut = cuts.pop()
        return cut
