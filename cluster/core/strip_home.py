"""The home's part for erasure-coded objects: one order of writes for all strips of an object, reads that decode.

 layout     which member holds which strip: strip i on the i-th replica, unless peering found the strips elsewhere
 write      small: new bytes for the data strips touched, and deltas for the parity strips, for which the old bytes must
            be known; whole stripes: encoded at once. Who gets what when: core.strip_sends. The strips that it does not
            touch get its version later (core.strip_levels)
 read       from the data strips; what is on none of the members is decoded from any D strips

Until all strips have been sent their part of a change no other one of the same bytes may come: they are locked. Then
the locks are free, because links and strips keep the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Corrupt, DiskError, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, strip_index, strip_of
from sheepdog.cluster.core.loose_strips import LooseStrips
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.ports import ReadDone
from sheepdog.cluster.core.range_locks import Lock, RangeLocks
from sheepdog.cluster.core.refusals import Refusals
from sheepdog.cluster.core.replica import touched
from sheepdog.cluster.core.strip_fetches import Fetches, Pieces
from sheepdog.cluster.core.strip_levels import StripLevels
from sheepdog.cluster.core.strip_replica import StripReplica
from sheepdog.cluster.core.strip_sends import Sending, StripSends
from sheepdog.cluster.core.strip_undo import ALL_STRIPS
from sheepdog.cluster.core.striping import (
    NOTHING,
    UNIT,
    Change,
    Piece,
    encode_creation,
    encode_part,
    encode_stripes,
    mask_of,
    pieces,
    rows_to_range,
    spans,
    strip_size,
    stripe_size,
)

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home
    from sheepdog.cluster.core.home_writes import Submission

Layout: TypeAlias = tuple[int, ...]
"""Member by strip; NOBODY where none has it."""
NOBODY = -1
_WHOLE = 1 << 62  # end of a range that covers any object


class StripHome:
    """Of one home, in one epoch."""

    def __init__(self, context: Context, home: Home, strips: StripReplica) -> None:
        self._context = context
        self._home = home
        self._strips = strips
        self._placement = context.placement
        self._me = context.placement.me
        self._layouts: dict[ObjectId, Layout] = {}  # of objects whose strips are not where they would be put now
        self._locks = RangeLocks()
        self._forgotten: dict[ObjectId, None] = {}  # lost, and about to be created anew
        self._versions: dict[ObjectId, Version] = {}  # last one given to objects that are to be repaired
        self._loose = LooseStrips(context)
        self.sends = StripSends(context, home, strips, self._release)
        self.levels = StripLevels(context, home)
        self.refusals = Refusals(self._strip_on)

    # -- layouts ---------------------------------------------------------------------------------------------------

    def layout(self, oid: ObjectId, policy: Policy) -> Layout:
        found = self._layouts.get(oid)
        if found is None:
            found, strips = self._placement.replicas(oid), policy.data + policy.parity
            if len(found) != strips:
                found = found[:strips] + (NOBODY,) * (strips - len(found))
        return found

    def assign(self, oid: ObjectId, layout: Layout) -> None:
        self._layouts[oid] = layout

    def holders(self, oid: ObjectId, policy: Policy) -> Mapping[int, int]:
        """Member by strip, of the strips that are current."""
        found = self._home.recovery.strip_holders(oid)
        if found is not None:
            return found
        return {strip: member for strip, member in enumerate(self.layout(oid, policy)) if member != NOBODY}

    def own_strip(self, oid: ObjectId, policy: Policy) -> ObjectId | None:
        """The strip that belongs on this node."""
        layout = self.layout(oid, policy)
        return strip_of(oid, layout.index(self._me)) if self._me in layout else None

    def _strip_on(self, member: int, oid: ObjectId) -> int | None:
        """The strip that belongs on a member."""
        policy = self._context.policy_of(oid)
        layout = () if policy is None else self.layout(oid, policy)
        return layout.index(member) if member in layout else None

    def forget(self, oid: ObjectId) -> None:
        """Too few strips are left of it: it does not exist until it is created."""
        self._forgotten[oid] = None

    def exists(self, oid: ObjectId, policy: Policy) -> bool:
        if oid in self._forgotten:
            return False
        if self._home.recovery.strip_holders(oid) is not None:
            return True
        strip = self.own_strip(oid, policy)
        return strip is not None and self._context.store.version(strip) is not None

    def last_version(self, oid: ObjectId, policy: Policy) -> Version | None:
        """The version of the strips once no write is on its way; None if this node cannot tell."""
        noted = self._versions.pop(oid, None)  # the strips are level: Recovery sees to that
        strip = self.own_strip(oid, policy)
        if strip is None:
            return noted
        own = self._context.store.version(strip)
        if own is None or own == NO_VERSION:
            return None  # a write that was answered may be newer than those noted: only the others know
        return own if noted is None else max(own, noted)

    def note_version(self, oid: ObjectId, version: Version) -> None:
        """A strip failed: what the others have is more than the store here may say."""
        self._versions[oid] = max(version, self._versions.get(oid, version))

    def next_version(self) -> Version:
        """For strips that become one state."""
        return self._home.next_version()

    # -- changes ---------------------------------------------------------------------------------------------------

    def busy(self, oid: ObjectId) -> bool:
        """A change is being prepared."""
        return self._locks.locked(oid)

    def submit(self, submission: Submission, policy: Policy) -> None:
        """Takes a change of an object that no recovery works on. Writes come cut (striping.cut)."""
        oid = submission.oid
        submission.flags &= ~Flag.DIRECT  # its gateway did not know yet that the object is coded
        start, end = touched(submission.flags, submission.offset, len(submission.data))
        if end != _WHOLE and NOBODY in self.layout(oid, policy):  # what is missing may have to be decoded
            size = stripe_size(policy)
            start, end = submission.offset // size * size, -(-(submission.offset + len(submission.data)) // size) * size
        self._locks.acquire(oid, start, end, lambda lock: self._begin(submission, policy, lock))

    def _release(self, lock: Lock) -> None:
        self._locks.release(lock)
        if not self._home.is_writing(lock.oid):
            self._home.recovery.quiet(lock.oid)

    def _begin(self, submission: Submission, policy: Policy, lock: Lock) -> None:
        oid, flags = submission.oid, submission.flags
        if self._home.recovery.holds(oid, False, lambda: self._home.submit(submission)):
            self._release(lock)
            return
        if oid in self._home.writing and self._home.writing[oid][-1].fresh:  # made by what was before this in the queue
            self._home.wait_for_creation(submission)
            self._release(lock)
            return
        layout = self.layout(oid, policy)
        exists = self.exists(oid, policy)
        coder = self._context.coder
        if flags & Flag.CREATE and sum(member != NOBODY for member in layout) < policy.data:
            self._refuse(submission, Result.HALT, lock)
        elif not exists and not flags & Flag.CREATE:  # it went while this waited
            self._refuse(submission, Result.SUCCESS if flags & Flag.REMOVE else Result.NO_OBJ, lock)
        elif flags & Flag.REMOVE:
            self._send(submission, policy, layout, [NOTHING] * policy.strips, flags, lock)
            self._layouts.pop(oid, None)
        elif flags & Flag.CREATE and flags & Flag.ONLY_NEW and exists:
            self._refuse(submission, Result.SUCCESS, lock)
        elif flags & Flag.CREATE and exists:
            whole = bytearray(self._context.size_of(oid))
            whole[submission.offset : submission.offset + len(submission.data)] = submission.data
            self._send(submission, policy, layout, encode_stripes(coder, policy, 0, whole), flags & ~Flag.CREATE, lock)
        elif flags & Flag.CREATE:
            self._forgotten.pop(oid, None)
            changes = encode_creation(coder, policy, submission.offset, submission.data)
            self._send(submission, policy, layout, changes, flags & ~Flag.ONLY_NEW, lock)
        elif not submission.data:
            self._send(submission, policy, layout, [NOTHING] * policy.strips, flags, lock)
        elif submission.offset % stripe_size(policy) or len(submission.data) % stripe_size(policy):
            self._update(submission, policy, layout, lock)
        else:
            changes = encode_stripes(coder, policy, submission.offset, submission.data)
            self._send(submission, policy, layout, changes, flags, lock)

    def _refuse(self, submission: Submission, result: Result, lock: Lock) -> None:
        self._release(lock)
        submission.done(result, b"")

    def _update(self, submission: Submission, policy: Policy, layout: Layout, lock: Lock) -> None:
        """A write within one stripe: the parity is changed by the difference, so the old bytes are asked for.

        A single strip of another node is written at once, and its node answers with them. Where it would answer only
        when the write is on its disk, and the parity strips write theirs behind that, they are looked at first.
        """
        parts = pieces(policy, submission.offset, len(submission.data))
        flags = submission.flags
        waits = flags & Flag.DURABLE and not self._context.store.nosync  # a guess: it is the other node's that counts
        if len(parts) == 1 and not waits and NOBODY not in layout and layout[parts[0].strip] != self._me:
            mask = (1 << policy.strips) - (1 << policy.data) | 1 << parts[0].strip
            if not self._loose.takes_along(submission.oid, flags, mask):
                self.sends.replace(self._number(submission, policy, layout, mask, flags, lock), parts[0])
                return
        update = _Update(self, submission, policy, layout, lock, parts)
        for number, part in enumerate(parts):
            member = layout[part.strip]
            looked = partial(update.looked, number)
            if member == NOBODY:
                self._decode(submission.oid, policy, part.strip, part.offset, part.length, looked)
            else:
                self._fetch(submission.oid, part.strip, member, part.offset, part.length, looked)

    def updated(self, update: _Update) -> None:
        """The old bytes are here, unless one of them could not be read."""
        submission, policy = update.submission, update.policy
        # The strip is being repaired, or its disk is gone: the write comes again. So it does behind writes of which the
        # parity has not got its part: with a later one it would look as if it had.
        if update.failed or self.refusals.is_void(submission.oid):
            self._refuse(submission, Result.AGAIN, update.lock)
            return
        changes = encode_part(self._context.coder, policy, update.parts, submission.data, update.old)
        self._send(submission, policy, update.layout, changes, submission.flags, update.lock)

    def _send(
        self,
        submission: Submission,
        policy: Policy,
        layout: Layout,
        changes: Sequence[Change],
        flags: int,
        lock: Lock,
    ) -> None:
        """Numbers the change and hands the strips that it touches their part; all get one that has no bytes."""
        whole = flags & (Flag.CREATE | Flag.REMOVE)
        mask = ALL_STRIPS if whole else mask_of(changes) or ALL_STRIPS
        self.sends.send(self._number(submission, policy, layout, mask, flags, lock), changes)

    def _number(
        self, submission: Submission, policy: Policy, layout: Layout, mask: int, flags: int, lock: Lock
    ) -> Sending:
        """The change, which touches the strips `mask`, gets its number, and so its place in the order of all strips."""
        oid = submission.oid
        stored = [(strip, member) for strip, member in enumerate(layout) if member != NOBODY]
        reached = self._loose.changed(oid, flags, mask)
        members = [entry for entry in stored if reached >> entry[0] & 1]
        fresh = bool(flags & Flag.CREATE)
        write = self._home.open_write(submission, len(members), fresh)
        write.ordered = True
        write.tolerance = len(stored) - policy.data
        if flags & Flag.REMOVE:
            self.levels.wrote(oid, write.version, (), True)
        else:
            self.levels.wrote(oid, write.version, stored, len(members) == len(stored))
        if self._home.recovery.strip_holders(oid) is not None:
            self.note_version(oid, write.version)
        size = strip_size(policy, self._context.size_of(oid)) if fresh else mask
        return Sending(write, policy, members, flags, size, lock)

    def remove(self, submission: Submission, policy: Policy) -> None:
        """Takes back a creation that failed; the strips that could be made go."""
        self._locks.acquire(
            submission.oid,
            0,
            _WHOLE,
            lambda lock: self._send(
                submission,
                policy,
                self.layout(submission.oid, policy),
                [NOTHING] * policy.strips,
                Flag.REMOVE,
                lock,
            ),
        )

    # -- reads -----------------------------------------------------------------------------------------------------

    def readable(self, strip: ObjectId, oid: ObjectId, policy: Policy, offset: int, length: int) -> bool:
        """The strip here may be read directly: no write that some other strip may not have touches it."""
        home = self._home
        if not home.active or strip != self.own_strip(oid, policy) or home.recovery.strip_holders(oid) is not None:
            return False
        low = offset // UNIT * stripe_size(policy)
        high = -(-(offset + length) // UNIT) * stripe_size(policy)
        if length <= UNIT and offset // UNIT == (offset + length - 1) // UNIT:
            low += strip_index(strip) * UNIT + offset % UNIT
            high = low + length
        return not home.is_writing_range(oid, low, high)

    def read(self, oid: ObjectId, policy: Policy, offset: int, length: int, done: ReadDone) -> None:
        """The bytes as all changes sent so far leave them; DiskError when fewer than D strips can be read."""
        parts = pieces(policy, offset, length)
        wanted = spans(parts)
        pieces_read = Pieces(parts, len(wanted), length, done)
        for strip, (at, size) in wanted.items():
            self._read_strip(oid, policy, strip, at, size, partial(pieces_read.got, strip, at))

    def _read_strip(self, oid: ObjectId, policy: Policy, strip: int, offset: int, length: int, got: ReadDone) -> None:
        member = self.holders(oid, policy).get(strip)
        if member is None:
            self._read_decoded(oid, policy, strip, offset, length, got)
        else:
            fetched = partial(self._fetched, oid, policy, strip, offset, length, got)
            self._fetch(oid, strip, member, offset, length, fetched)

    def _fetched(
        self, oid: ObjectId, policy: Policy, strip: int, at: int, size: int, got: ReadDone, data: Buffer | StoreError
    ) -> None:
        if isinstance(data, StoreError):
            self._read_decoded(oid, policy, strip, at, size, got)
        else:
            got(data)

    def _read_decoded(
        self, oid: ObjectId, policy: Policy, strip: int, offset: int, length: int, done: ReadDone
    ) -> None:
        """Decodes while no write changes the stripes. A write before it may have failed at another strip just now, so
        that this one cannot be decoded; then what the home has learnt meanwhile tells where else the bytes are."""
        self._context.probe("strips.decoded")
        start, size = rows_to_range(policy, offset, length)

        def locked(lock: Lock) -> None:
            holders = dict(self.holders(oid, policy))

            def decoded(data: Buffer | StoreError) -> None:
                self._release(lock)
                if isinstance(data, StoreError) and self.holders(oid, policy) != holders:
                    self._context.probe("strips.holders_changed")
                    self._read_strip(oid, policy, strip, offset, length, done)
                else:
                    done(data)

            self._decode(oid, policy, strip, offset, length, decoded)

        self._locks.acquire(oid, start, start + size, locked)

    def _decode(self, oid: ObjectId, policy: Policy, wanted: int, offset: int, length: int, done: ReadDone) -> None:
        """One strip's bytes from D others; the caller has locked the stripes."""
        holders = self.holders(oid, policy)
        left = sorted(
            (strip for strip in holders if strip != wanted), key=lambda strip: (holders[strip] != self._me, strip)
        )

        def fetch(strip: int, arrived: ReadDone) -> None:
            self._fetch(oid, strip, holders[strip], offset, length, arrived)

        def decoded(have: dict[int, Buffer]) -> None:
            if len(have) == policy.data:
                done(self._context.coder.decode(policy, have, [wanted])[0])
            else:
                done(DiskError(f"object {oid:016x}: {len(have)} strips are readable, {policy.data} are needed"))

        Fetches(left, policy.data, fetch, decoded).go_on()

    def read_all(
        self, oid: ObjectId, policy: Policy, offset: int, length: int, done: Callable[[dict[int, Buffer]], None]
    ) -> None:
        """A range of every strip that can be read, all as the same writes leave them: the next write there waits, since
        a read that is under way could see it. What cannot be read is left to who verifies it."""
        start, size = rows_to_range(policy, offset, length)
        self._locks.acquire(oid, start, start + size, partial(self._read_locked, oid, policy, offset, length, done))

    def _read_locked(
        self,
        oid: ObjectId,
        policy: Policy,
        offset: int,
        length: int,
        done: Callable[[dict[int, Buffer]], None],
        lock: Lock,
    ) -> None:
        holders = self.holders(oid, policy)
        fetch = partial(self._fetch_of, oid, holders, offset, length)
        Fetches(sorted(holders), len(holders), fetch, partial(self._all_read, lock, done)).go_on()

    def _all_read(self, lock: Lock, done: Callable[[dict[int, Buffer]], None], have: dict[int, Buffer]) -> None:
        self._release(lock)
        done(have)

    def _fetch_of(
        self, oid: ObjectId, holders: Mapping[int, int], offset: int, length: int, strip: int, arrived: ReadDone
    ) -> None:
        self._fetch(oid, strip, holders[strip], offset, length, arrived, False)

    def _fetch(
        self, oid: ObjectId, strip: int, member: int, offset: int, length: int, done: ReadDone, repair: bool = True
    ) -> None:
        """Present bytes of a strip; one that cannot be read is going to be repaired."""
        context, fence = self._context, self._context.fence
        strip_oid = strip_of(oid, strip)

        def read(data: Buffer | StoreError) -> None:
            if context.fence != fence:
                return
            if isinstance(data, StoreError):
                self._cannot_be_read(oid, strip, member, data, done, repair)
            else:
                done(data)

        def answered(answer: Message) -> None:
            if answer.result == Result.SUCCESS:
                assert not isinstance(answer.body, list)
                done(answer.body)
            elif answer.result == Result.EIO:
                error = Corrupt(f"{self._placement.nodes[member]} cannot read its strip")
                self._cannot_be_read(oid, strip, member, error, done, repair)
            else:
                done(DiskError(f"{self._placement.nodes[member]}: result {answer.result:#x}"))

        if member == self._me:
            self._strips.look(strip_oid, offset, length, read)
        else:
            message = Message(Kind.FETCH, fence, oid=strip_oid, offset=offset, length=length)
            context.peers.request(self._placement.nodes[member], message, answered)

    def _cannot_be_read(
        self, oid: ObjectId, strip: int, member: int, error: StoreError, done: ReadDone, repair: bool
    ) -> None:
        if repair and isinstance(error, Corrupt):
            self._context.probe("strips.corrupt")
            self.refusals.useless(oid, strip)
            self._home.recovery.suspect(oid, member)
        done(error)


class _Update:
    """A small write and the bytes that its pieces replace, as they come."""

    __slots__ = ("_home", "_left", "failed", "layout", "lock", "old", "parts", "policy", "submission")

    def __init__(
        self,
        home: StripHome,
        submission: Submission,
        policy: Policy,
        layout: Layout,
        lock: Lock,
        parts: Sequence[Piece],
    ) -> None:
        self._home = home
        self._left = len(parts)
        self.submission = submission
        self.policy = policy
        self.layout = layout
        self.lock = lock
        self.parts = parts
        self.old: list[Buffer] = [b""] * len(parts)
        self.failed = False

    def looked(self, number: int, data: Buffer | StoreError) -> None:
        self._left -= 1
        if isinstance(data, StoreError):
            self.failed = True
        else:
            self.old[number] = data
        if not self._left:
            self._home.updated(self)
