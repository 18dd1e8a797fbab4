"""What a node knows of its own copies, carried from epoch to epoch (what it tells in inventories, core.peering)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, plain_oid
from sheepdog.cluster.core.peering import BLIND, UNSETTLED, UNSURE, Holding
from sheepdog.cluster.core.replica import Replica


class Lack(NamedTuple):
    """There is no current copy here of an object."""

    known: int  # the object existed in that epoch
    blind: int  # the copy here was current in that epoch, and went bad; 0: it was not current since it came
    maybe: int = 0  # the newest epoch in which it may have existed, as far as the disk here tells; 0: it tells nothing


_NOTHING_KNOWN = Lack(0, 0)
_NONE: Mapping[ObjectId, int] = MappingProxyType({})
_NO_LOSSES: Mapping[ObjectId, Lack] = MappingProxyType({})


class Standing:
    """How current the copies of this node are."""

    def __init__(
        self,
        settled: int,
        last: int = 0,
        broken: int = 0,
        unfinished: Iterable[ObjectId] = (),
        stale: Mapping[ObjectId, int] = _NONE,
        losses: Mapping[ObjectId, Lack] = _NO_LOSSES,
    ) -> None:
        """At the start of the node: every copy was current in `settled`, it last served in epoch `last`.

        `unfinished`: copies without a version. They were being restored when the node ended, or went with their disk.
        They may have been current before if some copy went bad since `settled`, last in the epoch `broken`.
        `stale`: strips that were to be made anew, in which epoch. `losses`: those of `unfinished` of which nobody had
        a current one later than that, and what was known of them then (core.stale_strips).
        """
        self.default = settled  # as_of of every copy not named below
        self.complete = settled
        self._settled = settled  # the newest epoch in which every copy was proven current
        self._unsettled: dict[ObjectId, None] | None = None  # whole objects; None at first: whatever was written since
        self._older: dict[ObjectId, int] = {}
        lack = Lack(last, broken) if broken else Lack(0, 0, last)
        self.lacking: dict[ObjectId, Lack] = dict.fromkeys(unfinished, lack)
        self.lacking.update((strip, Lack(epoch, 0)) for strip, epoch in stale.items())
        self.lacking.update(losses)

    def as_of(self, oid: ObjectId, version: Version) -> int:
        if version == NO_VERSION:
            return 0
        return max(self._older.get(oid, self.default), version.epoch)

    def unsettled(self, oid: ObjectId, version: Version) -> Iterator[Holding]:
        """What an inventory says beside the copy if it may have a write that copies on nodes which are away lack."""
        if plain_oid(oid) in self._unsettled if self._unsettled is not None else version.epoch >= self._settled:
            yield Holding(oid, version, self._settled, UNSETTLED)

    def advance(
        self,
        epoch: int,
        replica: Replica,
        copies: Iterable[tuple[ObjectId, Version]],
        in_flight: Iterable[ObjectId],
        equal: Callable[[ObjectId], bool],
    ) -> None:
        """Epoch `epoch` is over: copies that were current in it are as of it, the others stay as they were.

        So do strips that were about to become one state with others, of which some may have gone in between.
        `in_flight`: what was being written at its end. `equal`: all copies of the object were proven equal in it.
        """
        settled, before = replica.all_settled(), self.lacking
        lacking = {} if settled else dict(before)
        for oid in replica.missing:
            if replica.awaits_agreement(oid):
                continue  # it is not to stay here, but others are made from it
            if oid in replica.lost:
                lacking[oid] = self.lost(oid, replica.lost[oid])
            else:
                lacking[oid] = Lack(epoch, before.get(oid, _NOTHING_KNOWN).blind)
        for oid in replica.broken:
            lacking[oid] = Lack(epoch, epoch)
        older = {}
        self._unsettled = dict.fromkeys(map(plain_oid, in_flight))
        for oid, version in copies:
            if version.epoch >= self._settled and not equal(oid):
                self._unsettled[plain_oid(oid)] = None
            if oid in replica.broken or not replica.is_current(oid) or replica.awaits_agreement(oid):
                older[oid] = self.as_of(oid, version)
                if version == NO_VERSION and oid in before:
                    lacking.setdefault(oid, before[oid])
        self.default = epoch
        self._older = older
        self.lacking = lacking
        if settled:
            self.complete = epoch

    def lost(self, oid: ObjectId, known: int) -> Lack:
        """What is known of an object that nobody has in this epoch, and that is said to have existed in `known`."""
        mine = self.lacking.get(oid, _NOTHING_KNOWN)
        return mine._replace(known=max(mine.known, known))

    def step_back(self, epoch: int) -> None:
        """Later epochs, of which this tells, never were: what it says of them was so in this one. At the start."""
        self.default, self.complete = min(self.default, epoch), min(self.complete, epoch)
        self._settled = min(self._settled, epoch)
        self.lacking = {oid: Lack(*(min(one, epoch) for one in lack)) for oid, lack in self.lacking.items()}

    def settle(self, epoch: int) -> None:
        """Every copy of this node was proven current in `epoch`."""
        self.default = self.complete = self._settled = epoch
        self._older.clear()
        self.lacking = {}

    def lacks(self) -> Iterator[Holding]:
        """What an inventory says of objects without a current copy here."""
        for oid, (known, blind, maybe) in self.lacking.items():
            if known or not maybe:
                yield Holding(oid, NO_VERSION, known)
            if maybe > known:
                yield Holding(oid, NO_VERSION, maybe, UNSURE)
            if blind:
                yield Holding(oid, NO_VERSION, blind, BLIND)
