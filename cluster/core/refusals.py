"""Writes of coded objects that strips did not take, and which strips are one state of the object nevertheless.

A strip that refuses a write for want of space is what it was, and takes no later one (core.strip_replica). So
 * it is as good as the strips that took everything, if none of these took a write that it refused;
 * all data strips together are a state of the object, whatever the parity strips have: a write that did not get to all
   strips has not been answered as done (Home), so it may be there in part or not at all. Who still waits for the repair
   is told that it failed (`in_part`), and if he does not hear of that and asks again, it is done again (`undone`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.origins import Origin
from sheepdog.cluster.core.striping import pieces, spans

if TYPE_CHECKING:
    from sheepdog.cluster.core.home_writes import Write

_UNKNOWN: Final = -1  # as a set of strips: all of them


class _Torn(NamedTuple):
    """A write whose bytes some data strips did not take."""

    origin: Origin
    lacking: list[int]  # these strips
    begun: bool  # another one has


class Refusals:
    """Of the objects of one home, in one epoch, that are not whole."""

    def __init__(
        self, strip_on: Callable[[int, ObjectId], int | None], policy_of: Callable[[ObjectId], Policy | None]
    ) -> None:
        """`strip_on` tells which strip of an object belongs on a member."""
        self._strip_on = strip_on
        self._policy_of = policy_of
        self._missed: dict[ObjectId, dict[int, int]] = {}  # by strip: strips that took what it refused, a bit each
        self._uneven: dict[ObjectId, dict[int, None]] = {}  # strips that only could not be brought level
        self._torn: dict[ObjectId, list[_Torn]] = {}

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
            missed = self._missed.setdefault(oid, {})
            took = write.strips & ~sum(1 << strip for strip in failed)
            for strip, result in failed.items():
                if strip in missed:
                    missed[strip] |= took
                else:
                    missed[strip] = took if result == Result.NO_SPACE else _UNKNOWN
            written, by = self._written(write), write.submission
            if lacking := [strip for strip in written if strip in failed]:
                torn = _Torn(Origin(oid, by.number, by.gateway, write.version), lacking, len(lacking) < len(written))
                self._torn.setdefault(oid, []).append(torn)

    def _written(self, write: Write) -> Sequence[int]:
        """The data strips that have bytes of the write; other strips got no more than its version."""
        submission, policy = write.submission, self._policy_of(write.submission.oid)
        if policy is None:
            return ()
        if submission.flags & Flag.CREATE:  # what was there before is gone
            return range(policy.data)
        return list(spans(pieces(policy, submission.offset, len(submission.data))))

    def stayed_behind(self, oid: ObjectId, member: int) -> None:
        """A strip could not be given the version of a write that did not touch it."""
        strip = self._strip_on(member, oid)
        if strip is not None:
            self._uneven.setdefault(oid, {})[strip] = None

    def useless(self, oid: ObjectId, strip: int) -> None:
        """The bytes of the strip are gone or rotten."""
        if oid in self._missed or oid in self._uneven:
            self._missed.setdefault(oid, {})[strip] = _UNKNOWN

    def chosen(self, oid: ObjectId, policy: Policy, strips: Container[int]) -> None:
        """These strips are read from now on: the object is never again what others make of it."""
        for strip in range(policy.strips):
            if strip not in strips:
                self.useless(oid, strip)

    def restored(self, oid: ObjectId, strip: int) -> None:
        """The strip has all that the object is."""
        for strips in (self._missed.get(oid), self._uneven.get(oid)):
            if strips is not None:
                strips.pop(strip, None)

    def forget(self, oid: ObjectId) -> None:
        """All strips are equal, or the object is gone."""
        self._missed.pop(oid, None)
        self._uneven.pop(oid, None)
        self._torn.pop(oid, None)

    def known(self, oid: ObjectId) -> list[int]:
        """Strips that do not have all, or not its version."""
        return list({**self._missed.get(oid, {}), **self._uneven.get(oid, {})})

    def in_part(self, oid: ObjectId, strips: Container[int]) -> bool:
        """One of the strips refused what another one took."""
        return any(missed for strip, missed in self._missed.get(oid, {}).items() if strip in strips)

    def undone(self, oid: ObjectId) -> list[Origin]:
        """The writes of which the data strips, as they are, lack something, or all."""
        return [torn.origin for torn in self._still_torn(oid)]

    def half_done(self, oid: ObjectId) -> bool:
        """One of the data strips, as they are, has its part of a write of which another one lacks its own."""
        return any(torn.begun for torn in self._still_torn(oid))

    def _still_torn(self, oid: ObjectId) -> list[_Torn]:
        missed = self._missed.get(oid, {})
        return [torn for torn in self._torn.get(oid, ()) if any(strip in missed for strip in torn.lacking)]

    def sound(self, oid: ObjectId, policy: Policy, whole: Container[int]) -> list[int]:
        """Strips that are one state of the object, enough of them, if that is more than those that took all (`whole`);
        else none."""
        missed, uneven = self._missed.get(oid, {}), self._uneven.get(oid, {})
        unharmed = [strip for strip in missed if not missed[strip]] + [strip for strip in uneven if strip not in missed]
        good = [strip for strip in range(policy.strips) if strip in whole or strip in unharmed]
        if len(good) >= policy.data:
            return good if any(strip not in whole for strip in good) else []
        refused = [strip for strip in missed if missed[strip] != _UNKNOWN]
        data = [strip for strip in range(policy.data) if strip in good or strip in refused]
        return data if len(data) == policy.data else []
