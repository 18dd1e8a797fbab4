"""The replica machine: applies numbered writes to this node's copies, and knows which copies may be read here.

A copy is readable here without asking its home when, in this epoch,
 * the home has settled with this node, and it and all other replicas have the current copy, and
 * no write above the home's watermark touches the blocks (some other replica may not have it yet), but those of which
   the gateway here knows that all replicas have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from mypy_extensions import mypyc_attr

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, DiskError, NoObject, Result, StoreError
from sheepdog.cluster.core.ids import NO_OID, NO_VERSION, STRIP_SHIFT, NodeId, ObjectId, Version, plain_oid, version_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Flag, Message
from sheepdog.cluster.core.peering import Verdict
from sheepdog.cluster.core.ports import Buffer, Done, Store
from sheepdog.cluster.core.strip_levels import Leveled, decode_levels, encode_levels
from sheepdog.cluster.core.strip_replica import StripReplica

_SUCCESS: Final = int(Result.SUCCESS)  # looked up once, not for each write
_WHOLE: Final = 1 << 62  # end of a range that covers any object


def perform(
    store: Store, flags: int, oid: ObjectId, offset: int, length: int, data: Buffer, version: Version, done: Done
) -> bool:
    """One numbered change of a copy, as SUBMIT and APPLY describe it. True: the copy has it now, or is gone."""
    durable = bool(flags & Flag.DURABLE)
    if flags & Flag.CREATE:
        store.create(oid, length, offset, data, version, durable, done)
    elif flags & Flag.REMOVE:
        store.remove(oid, done)
        return True
    elif flags & Flag.PUNCH:
        store.punch(oid, offset, length, version, durable, done)
    else:
        return store.write(oid, offset, data, version, durable, done)
    return store.version(oid) == version


def spoilt(context: Context, flags: int, oid: ObjectId, done: Done) -> bool:
    """Refuses a change of a strip that could not take an earlier one: it stays what it was until it is made anew."""
    error = context.spoilt.get(oid)
    if error is None:
        return False
    if flags & (Flag.CREATE | Flag.REMOVE):  # another copy takes its place
        del context.spoilt[oid]
        return False
    context.probe("replica.spoilt")
    done(error)
    return True


def touched(flags: int, offset: int, length: int) -> tuple[int, int]:
    """First and last+1 byte that a change affects, in whole blocks: the unit of atomicity."""
    if flags & (Flag.CREATE | Flag.REMOVE):
        return 0, _WHOLE
    return offset - offset % BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE) * BLOCK_SIZE


def note_origin(
    context: Context, flags: int, oid: ObjectId, gateway: int, number: int, floor: int, version: Version
) -> None:
    """Remembers whose write a copy here contains from now on; number 0: a home takes back a creation that failed."""
    if number:
        context.origins.add(gateway, number, floor, plain_oid(oid), version)
    elif flags & Flag.REMOVE:
        context.origins.forget(plain_oid(oid))


@mypyc_attr(acyclic=True)  # the collector need not look at it
class _Change:
    """A numbered change of a home, remembered until all replicas have it."""

    __slots__ = ("answered", "end", "levels", "oid", "result", "sequence", "stable", "start")

    def __init__(self, sequence: int, oid: ObjectId, start: int, end: int) -> None:
        self.sequence = sequence
        self.oid = oid
        self.start = start  # of the bytes that it touches
        self.end = end
        self.levels: list[Leveled] | None = None  # what it brings level, if it is that
        self.answered = False
        self.stable = False  # all have it, as this node's gateway knows before the home
        self.result = _SUCCESS


class _Applying:
    """A home's change on its way into the copy here, of which the store tells it the end (`ports.Done`).

    One object, where a nested function is two.
    """

    __slots__ = ("change", "fence", "message", "replica", "sender", "was_bad")

    def __init__(self, replica: Replica, sender: NodeId, message: Message, change: _Change, fence: int) -> None:
        self.replica = replica
        self.sender = sender
        self.message = message
        self.change = change
        self.fence = fence
        self.was_bad = bool(replica.missing) and message.oid in replica.missing

    def __call__(self, error: StoreError | None) -> None:
        self.replica.applied(self, error)


class _Feed:
    """What comes from one home in this epoch."""

    __slots__ = ("changes", "last")

    def __init__(self) -> None:
        self.last = 0  # highest sequence seen
        self.changes: list[_Change] = []  # by ascending sequence: those that some other replica may lack

    def find(self, sequence: int) -> _Change | None:
        """None: all replicas have it."""
        return next((change for change in self.changes if change.sequence == sequence), None)


class Replica:
    """Of one node, over all epochs; `begin` starts a new one."""

    def __init__(
        self,
        context: Context,
        went_bad: Callable[[ObjectId], None] = lambda _: None,
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """`went_bad` is told whenever a copy that was current is not any more, `replaced` when a client has made one
        anew, or removed it, that was not."""
        self._context = context
        self._went_bad = went_bad
        self._replaced = replaced
        self.strips = StripReplica(context)
        self.settled: list[bool] = []  # by home
        self.complete: list[bool] = []  # by home: it knows of all that exists
        self.missing: dict[ObjectId, None] = {}  # copies here that are not current
        self.lost: dict[ObjectId, int] = {}  # those of them that are not current anywhere; known to exist in that epoch
        self.broken: dict[ObjectId, None] = {}  # copies here that went bad in this epoch
        self.refused: dict[ObjectId, bool] = {}  # strips that lack a write; True: else they are good
        self.unequal: list[dict[ObjectId, None]] = []  # by home: current here, but another replica is not yet
        self.undecided: list[dict[ObjectId, None]] = []  # by home: those of them that have yet to become one version
        self._unstable: dict[ObjectId, list[_Change]] = {}  # those of the feeds, by object
        self._feeds: list[_Feed] = []  # by home

    def begin(self) -> None:
        """A new epoch: nothing is readable until the homes have settled with this node."""
        count = len(self._context.placement.members)
        self.settled = [False] * count
        self.complete = [False] * count
        self.unequal = [{} for _ in range(count)]
        self.undecided = [{} for _ in range(count)]
        self.missing = {}
        self.lost = {}
        self.broken = {}
        self.refused = {}
        self._context.spoilt = {}
        self._context.doubts = {}
        self._unstable = {}
        self._feeds = [_Feed() for _ in range(count)]
        self.strips.begin()

    def settle(self, home: int, verdict: Verdict) -> None:
        """The home decided which copies here are current, and which of those may be served already."""
        self.missing.update(dict.fromkeys(verdict.missing))
        self.missing.update((oid, None) for oid, _ in verdict.lost)
        self.lost.update(verdict.lost)
        self.undecided[home] = dict.fromkeys(verdict.undecided)
        self.unequal[home] = {**dict.fromkeys(verdict.unequal), **self.undecided[home]}
        self.complete[home] = verdict.complete
        repeated, self.settled[home] = self.settled[home], True
        if not repeated:  # else its writes may have come already
            self.strips.settled(home, {**self.missing, **self.unequal[home]})

    def restored(self, oid: ObjectId) -> None:
        """The copy here is current, whatever was wrong with it; or it is gone, as it should be."""
        self.missing.pop(oid, None)
        self.lost.pop(oid, None)
        self.broken.pop(oid, None)
        self.refused.pop(oid, None)
        self.strips.changes.trust(oid)
        self._context.spoilt.pop(oid, None)

    def spoil(self, oid: ObjectId) -> None:
        """The copy here lacks a write, or has lost its bytes: it tells nothing of the object any more."""
        self.missing[oid] = None
        self.doubt(oid)

    def refuse(self, strip: ObjectId, version: Version) -> None:
        """The strip lacks the write `version`; if it does not pretend to have it, it is what it was, good or bad."""
        now = self._context.store.version(strip)
        was_good = strip not in self.missing and strip not in self.broken
        is_as_before = now is not None and NO_VERSION < now < version and self.refused.get(strip, was_good)
        self.spoil(strip)
        self.refused[strip] = is_as_before

    def reconsider(self) -> None:
        """The epoch ends. A strip that was good and refused a write, and of which no home has said that it does not
        count, is one that the write has not come to; as it would be after a restart."""
        for strip in [strip for strip, is_as_before in self.refused.items() if is_as_before]:
            self.missing.pop(strip, None)
            self.broken.pop(strip, None)

    def doubt(self, oid: ObjectId) -> None:
        """The copy here is not to be trusted and made anew; should the epoch end before, it tells nothing."""
        self.broken[oid] = None
        self.refused.pop(oid, None)
        if oid >> STRIP_SHIFT:
            self.strips.changes.distrust(oid)
        self._context.doubts[oid] = self._context.doubts.get(oid, 0) + 1
        self._went_bad(oid)

    def recovered(self, home: int) -> None:
        """All copies of the home's objects are equal."""
        self.unequal[home] = {}
        self.undecided[home] = {}

    def all_settled(self) -> bool:
        """What this node lacks, or should not have, is known."""
        return bool(self.settled) and all(self.settled) and all(self.complete)

    def is_current(self, oid: ObjectId) -> bool:
        """The copy here was proven current in this epoch."""
        placement = self._context.placement
        replicas = placement.replicas(oid)
        if placement.me not in replicas:
            return False  # left over from before: nobody told this node what has become of the object
        return replicas[0] < len(self.settled) and self.settled[replicas[0]] and oid not in self.missing

    def awaits_agreement(self, strip: ObjectId) -> bool:
        """The strip here is one of a state that the strips are to be brought to, or was when its home began."""
        home = self._context.placement.home(strip)
        return home is not None and strip in self.undecided[home]

    def readable(self, oid: ObjectId, home: int, offset: int, length: int) -> bool:
        if not self.settled[home] or oid in self.missing or oid in self.unequal[home]:
            return False
        unstable = self._unstable.get(oid)
        if unstable is None:
            return True
        end = offset + length
        return not any(change.start < end and offset < change.end for change in unstable)

    def unstable(self) -> Iterable[ObjectId]:
        """Copies here with a write that some other replica may lack."""
        return self._unstable

    def on_apply(self, sender: NodeId, message: Message) -> None:
        """A home's write. One that comes a second time (the link broke) is answered, not applied again."""
        context = self._context
        home = context.placement.index_of[sender]
        feed = self._feeds[home]
        if message.sequence <= feed.last:
            context.probe("replica.apply_repeated")
            self._answer_again(sender, message, feed)
            return
        self._stable(feed, message.watermark)
        oid, flags = message.oid, message.flags
        body = message.body
        assert not isinstance(body, list)
        own = bool(flags & Flag.OWN)
        if own:
            flags &= ~Flag.OWN
            body = context.submitted(message.origin)
        start, end = touched(flags, message.offset, message.length if flags & Flag.PUNCH else len(body))
        change = _Change(message.sequence, oid, start, end)
        feed.last = message.sequence
        feed.changes.append(change)
        unstable = self._unstable.get(oid)
        if unstable is None:
            self._unstable[oid] = [change]
        else:
            unstable.append(change)
        answer = _Applying(self, sender, message, change, context.fence)
        counters = context.counters
        if flags & Flag.REMOVE:
            counters.peer_removes += 1
            self.restored(oid)  # a copy that went with its disk: there is nothing to be restored any more
        else:
            counters.peer_writes += 1
            counters.peer_rx += 0 if own else len(body)
        if own and not body:
            context.probe("replica.own_bytes_gone")
            answer(NoObject("the bytes of a write are not here any more"))
            return
        if context.spoilt and spoilt(context, flags, oid, answer):  # a strip
            return
        if oid >> STRIP_SHIFT:
            taken = partial(
                note_origin, context, flags, oid, message.gateway, message.origin, message.floor, message.version
            )
            self.strips.perform(flags, oid, message.offset, message.length, body, message.version, taken, answer)
        else:
            version = message.version
            if perform(context.store, flags, oid, message.offset, message.length, body, version, answer):
                note_origin(context, flags, oid, message.gateway, message.origin, message.floor, version)

    def _answer_again(self, sender: NodeId, message: Message, feed: _Feed) -> None:
        """To a change that has come before; while it is being applied, its answer is yet to come."""
        change = feed.find(message.sequence)
        if change is None:
            self._context.peers.answer(sender, message, _SUCCESS)
        elif change.answered and message.flags & Flag.OLD:
            self._answer_with_old(sender, message, change)
        elif change.answered:
            self._context.peers.answer(sender, message, change.result)

    def applied(self, applying: _Applying, error: StoreError | None) -> None:
        """The store has a home's change, or cannot take it."""
        context = self._context
        if context.fence != applying.fence:
            return  # fenced: that home does not count any more
        sender, message, change = applying.sender, applying.message, applying.change
        flags, oid = message.flags, message.oid
        change.answered = True
        if error is not None:
            self._refuse(message, change, error)
        else:
            was_bad = applying.was_bad or (bool(self.missing) and oid in self.missing)
            if flags & (Flag.CREATE | Flag.REMOVE):  # whatever was wrong with the copy, it is another one now
                self.restored(oid)
                if was_bad:
                    self._replaced()
            if flags & Flag.DIRECT and not was_bad:
                self._tell_gateway(message)
                context.peers.answer_late(sender, message)
                return
        if flags & Flag.OLD:
            self._answer_with_old(sender, message, change)
        else:
            context.peers.answer(sender, message, change.result)

    def _refuse(self, message: Message, change: _Change, error: StoreError) -> None:
        """The copy here lacks a write."""
        context, oid = self._context, message.oid
        context.log(3, f"object {oid:016x}: cannot apply a write: {error}")
        rotten = bool(message.flags & Flag.OLD) and isinstance(error, Corrupt) and oid not in context.spoilt
        if not rotten:  # else no strip will have the write: none lacks it
            if oid >> STRIP_SHIFT:
                context.spoilt.setdefault(oid, error)
                self.refuse(oid, message.version)
            else:
                self.spoil(oid)
        change.result = int(error.result)

    def _answer_with_old(self, sender: NodeId, message: Message, change: _Change) -> None:
        """To APPLY, perhaps again, with the bytes that were there."""
        old: Buffer | None = b""
        if not change.result:
            old = self.strips.undo.replaced(message.oid, message.version)
            if old is None:
                self._context.probe("replica.old_bytes_gone")
                self._refuse(message, change, DiskError("what it replaced is not known any more"))
        self._context.peers.answer(sender, message, change.result, old or b"")

    def _tell_gateway(self, message: Message) -> None:
        """A write is in the copy here. Its gateway answers when it has heard so of all copies."""
        context, gateway = self._context, message.gateway
        if gateway == context.placement.me:
            context.applied(message.origin, message.sequence, message.copies)
        else:
            context.network.applied(context.placement.nodes[gateway], context.fence, message.origin, message.sequence)

    def stabilized(self, oid: ObjectId, sequence: int) -> None:
        """All replicas have a change of which the home has not said so yet: it may be read here."""
        for change in self._unstable.get(oid, ()):
            if change.sequence == sequence:
                self._may_be_read(change)
                change.stable = True
                return

    def on_stable(self, sender: NodeId, message: Message) -> None:
        self._stable(self._feeds[self._context.placement.index_of[sender]], message.watermark)

    def _stable(self, feed: _Feed, watermark: int) -> None:
        """All replicas have every change of a home up to `watermark`."""
        stable = 0
        for change in feed.changes:
            if change.sequence > watermark:
                break
            stable += 1
            if change.levels is not None:
                for strip, version in change.levels:
                    self.strips.undo.level(strip, version)
            else:
                self._forget(change)
        if stable:
            del feed.changes[:stable]

    def _forget(self, change: _Change) -> None:
        oid = change.oid
        if oid >> STRIP_SHIFT:
            self.strips.undo.settle(oid, version_of(self._context.epoch, self._context.state.term, change.sequence))
        if not change.stable:
            self._may_be_read(change)

    def _may_be_read(self, change: _Change) -> None:
        """All replicas have it, so it is no reason any more to ask the home."""
        unstable = self._unstable[change.oid]
        if len(unstable) > 1:
            unstable.remove(change)
        else:
            del self._unstable[change.oid]

    def on_level(self, sender: NodeId, message: Message) -> None:
        """A home brings strips level; as APPLY, once."""
        context = self._context
        feed = self._feeds[context.placement.index_of[sender]]
        fence = context.fence
        if message.flags & Flag.UNEVEN:
            self._uneven(feed, message)
            context.peers.answer(sender, message, _SUCCESS)
            return
        if message.sequence <= feed.last:
            self._answer_again(sender, message, feed)
            return
        self._stable(feed, message.watermark)
        levels = decode_levels(message.payload())
        change = _Change(message.sequence, NO_OID, 0, 0)
        change.levels = levels
        feed.last = message.sequence
        feed.changes.append(change)
        version_of_level = dict(levels)

        def done(failed: list[ObjectId]) -> None:
            if context.fence != fence:
                return
            change.answered = True
            body = encode_levels((strip, version_of_level[strip]) for strip in failed)
            context.peers.answer(sender, message, Result.SUCCESS, body)

        self.strips.bring_level(levels, done)

    def _uneven(self, feed: _Feed, message: Message) -> None:
        """Of strips that were brought level, some other one of the object was not."""
        change = feed.find(message.offset)
        if change is not None and change.levels is not None:
            still = dict(decode_levels(message.payload()))
            change.levels = [level for level in change.levels if level[0] not in still]
