"""Reads at the home: from its own copy, never of what some replica may not have yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sheepdog.cluster.core.blocks import block_map
from sheepdog.cluster.core.errors import Corrupt, DiskError, Result, StoreError
from sheepdog.cluster.core.home_writes import IoDone
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.ports import Buffer

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home


class HomeReads:
    """Of one home machine."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone, flags: int = 0) -> None:
        """Reads from the own copy, or, if that is rotten or its disk fails, from another one (and has it repaired).

        With MAP in `flags`: which of its blocks hold data (core.blocks).
        """

        home = self._home

        again = partial(self.read, oid, offset, length, done, flags)
        if not home.active:
            home.hold(again)
            return
        elsewhere = home.recovery.elsewhere(oid) if not flags & Flag.MAP else None
        if elsewhere is not None:
            self._read_elsewhere(oid, offset, length, done, *elsewhere)
            return
        if home.recovery.holds(oid, True, again) or self.waits_for_write(oid, offset, length, home.sequence, again):
            return
        if home.is_lost(oid):
            done(Result.EIO, b"")
            return
        is_here = home.context.store.version(oid) is not None  # then it is kept as whole copies
        policy = None if is_here else home.context.policy_of(oid)
        if not is_here and not home.exists(oid, policy):
            done(home.absent(oid), b"")
            return

        doubts = home.context.doubts.get(oid)

        def read(data: Buffer | StoreError) -> None:
            if home.context.fence != home.fence:
                return  # fenced: the gateway asks again in the new epoch
            if doubts != home.context.doubts.get(oid):  # the copy was being made anew while the store was reading
                again()
            elif not isinstance(data, StoreError):
                self._deliver(oid, offset, length, done, data, home.sequence)
            elif policy is None and self._is_bad(oid, data):
                home.context.probe("home.corrupt")
                home.context.log(3, f"object {oid:016x}: {data}; another copy answers")
                home.recovery.suspect(oid, home.me)
                version = home.context.store.version(oid) or NO_VERSION
                if version == NO_VERSION:
                    self.read(oid, offset, length, done, flags)
                elif not home.recovery.knows(oid):  # there is nothing to restore it from
                    done(Result.EIO, b"")
                else:
                    others = [member for member in home.context.placement.replicas(oid) if member != home.me]
                    self._read_elsewhere(oid, offset, length, done, version, others)
            else:
                done(data.result, b"")

        if flags & Flag.MAP and policy is not None:  # no node has the whole table: all of it may be data
            done(Result.SUCCESS, b"\xff" * (length // BLOCK_SIZE // 8))
        elif flags & Flag.MAP:
            self._answer_map(oid, done)
        elif policy is None:
            home.context.store.read(oid, offset, length, read)
        else:
            home.strips.read(oid, policy, offset, length, read)

    def _deliver(self, oid: ObjectId, offset: int, length: int, done: IoDone, data: Buffer, begun: int) -> None:
        """Bytes of a write that began while the store was reading may be among the data already."""
        again = partial(self._deliver, oid, offset, length, done, data, begun)
        if not self.waits_for_write(oid, offset, length, begun, again):
            done(Result.SUCCESS, data)

    def _answer_map(self, oid: ObjectId, done: IoDone) -> None:
        try:
            done(Result.SUCCESS, block_map(self._home.context.store.table(oid)))
        except StoreError as error:
            done(error.result, b"")

    def waits_for_write(self, oid: ObjectId, offset: int, length: int, begun: int, retry: Callable[[], None]) -> bool:
        """True if a write of these blocks, up to number `begun`, is on its way: `retry` is called after it.

        Nobody may see bytes that some replica does not have yet: they might be taken back.
        """
        for write in reversed(self._home.writing.get(oid, ())):
            if write.sequence <= begun and write.start < offset + length and offset < write.end:
                write.hurry(retry)
                return True
        return False

    def _is_bad(self, oid: ObjectId, error: StoreError) -> bool:
        """The copy here is rotten, or went with its disk."""
        return isinstance(error, (Corrupt, DiskError)) or self._home.context.store.version(oid) == NO_VERSION

    def _read_elsewhere(
        self, oid: ObjectId, offset: int, length: int, done: IoDone, version: Version, others: Sequence[int]
    ) -> None:
        """The own copy is being repaired: others that have the version answer. If none can, its repair decides."""
        home = self._home

        def repaired(result: int) -> None:
            if result:
                done(Result.EIO, b"")
            else:
                self.read(oid, offset, length, done)

        def answered(answer: Message) -> None:
            if answer.result == Result.SUCCESS:
                assert not isinstance(answer.body, list)
                done(Result.SUCCESS, answer.body)
            elif answer.result == Result.STALE_OBJ and home.recovery.elsewhere(oid) is None:
                self.read(oid, offset, length, done)  # it was repaired, and written, meanwhile
            else:
                self._read_elsewhere(oid, offset, length, done, version, others[1:])

        if others:
            message = Message(Kind.FETCH, home.fence, oid=oid, offset=offset, length=length, version=version)
            home.context.peers.request(home.context.placement.nodes[others[0]], message, answered)
        else:
            home.recovery.when_restored(oid, repaired)
