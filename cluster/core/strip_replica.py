"""The strips of this node: applies numbered changes, with what is needed to take them back.

A change may have to read first (the bytes it replaces, the parity it is XORed into). Reads of the store may take a
while, so the changes and reads of one strip queue behind each other and take effect in the order in which they came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import xor
from sheepdog.cluster.core.errors import NoObject, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, NodeId, ObjectId, Version, oid_name, plain_oid
from sheepdog.cluster.core.messages import Buffer, Flag, Message
from sheepdog.cluster.core.origins import decode_origins
from sheepdog.cluster.core.ports import Done, ReadDone
from sheepdog.cluster.core.strip_undo import Undo, UndoLog


class NoWayBack(StoreError):
    """The strip does not know how to get to the version that is wanted: it has to be rebuilt."""

    result = Result.STALE_OBJ


class StripReplica:
    """Of one node, over all epochs; `begin` starts a new one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.undo = UndoLog()
        self._queues: dict[ObjectId, deque[Callable[[], None]]] = {}  # of strips that are being read for a change

    def begin(self) -> None:
        """What has not been written yet never is: its home does not count any more."""
        self._queues = {}

    def clear(self) -> None:
        """The cluster was formatted."""
        self._queues = {}
        self.undo.clear()

    def settled(self, home: int, missing: Container[ObjectId]) -> None:
        """The home agreed with all that hold strips of its objects on what they are; older versions do not matter."""
        placement = self._context.placement
        for strip in self.undo.strips():
            if strip not in missing and placement.home(strip) == home:
                self.undo.drop(strip)

    # -- changes -----------------------------------------------------------------------------------------------

    def perform(
        self,
        flags: int,
        strip: ObjectId,
        offset: int,
        length: int,
        data: Buffer,
        version: Version,
        taken: Callable[[], None],
        done: Done,
    ) -> None:
        """One numbered change, as APPLY describes it; without data only the version changes.

        `taken` is called when the strip has it; until then it may still come to nothing, with the epoch.
        """
        queue = self._queues.get(strip)
        if queue is not None:
            queue.append(lambda: self._perform(flags, strip, offset, length, data, version, taken, done))
        else:
            self._perform(flags, strip, offset, length, data, version, taken, done)

    def _perform(
        self,
        flags: int,
        strip: ObjectId,
        offset: int,
        length: int,
        data: Buffer,
        version: Version,
        taken: Callable[[], None],
        done: Done,
    ) -> None:
        store, durable = self._context.store, bool(flags & Flag.DURABLE)
        if flags & Flag.CREATE:
            self.undo.drop(strip)
            taken()
            store.create(strip, length, offset, data, version, durable, done)
            return
        if flags & Flag.REMOVE:
            self.undo.drop(strip)
            taken()
            store.remove(strip, done)
            return
        before = store.version(strip)
        if before is None or before == NO_VERSION:
            done(NoObject(f"no strip {oid_name(strip)} here"))
            return
        if not data:
            self.undo.keep(strip, Undo(before, version, 0, b""))
            taken()
            store.stamp(strip, version, durable, done)
            return
        queue = self._queues[strip] = deque()

        def read(old: Buffer | StoreError) -> None:
            if self._queues.get(strip) is not queue:
                return  # another epoch has begun
            del self._queues[strip]
            if isinstance(old, StoreError):
                done(old)
            else:
                self.undo.keep(strip, Undo(before, version, offset, old))
                taken()
                fresh = xor(old, data) if flags & Flag.XOR else data
                store.write(strip, offset, fresh, version, durable, done)
            self._run(strip, queue)

        store.read(strip, offset, len(data), read)

    def _run(self, strip: ObjectId, queue: deque[Callable[[], None]]) -> None:
        """What waited, until something has to read again; the rest waits behind that."""
        while queue:
            queue.popleft()()
            behind = self._queues.get(strip)
            if behind is not None:
                behind.extend(queue)
                return

    # -- reads -------------------------------------------------------------------------------------------------

    def read(self, strip: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """Sees every change that came before."""
        queue = self._queues.get(strip)
        if queue is not None:
            queue.append(lambda: self._context.store.read(strip, offset, length, done))
        else:
            self._context.store.read(strip, offset, length, done)

    def on_fetch(self, sender: NodeId, message: Message) -> None:
        """The home wants bytes as they are now, whatever their version."""
        context = self._context

        def done(data: Buffer | StoreError) -> None:
            if isinstance(data, StoreError):
                context.peers.answer(sender, message, data.result)
            else:
                context.counters.peer_reads += 1
                context.counters.peer_tx += len(data)
                context.peers.answer(sender, message, Result.SUCCESS, data)

        self.read(message.oid, message.offset, message.length, done)

    # -- going back --------------------------------------------------------------------------------------------

    def roll_back(self, strip: ObjectId, target: Version, origins: Buffer, done: Done) -> None:
        """The strip becomes what it was at `target`, durably; `origins`: the writes that it contains then."""
        context = self._context
        steps = self.undo.back_to(strip, target, context.store.version(strip))
        if steps is None:
            done(NoWayBack(f"strip {oid_name(strip)} cannot go back to {tuple(target)}"))
            return
        context.probe("strips.rolled_back")
        oid = plain_oid(strip)
        context.origins.forget(oid)
        context.origins.merge(decode_origins(origins))
        left, failed = len(steps), False
        if not left:
            done(None)

        def written(error: StoreError | None) -> None:
            nonlocal left, failed
            left -= 1
            failed = failed or error is not None
            if not left:
                if not failed:
                    self.undo.drop(strip)
                done(NoWayBack(f"strip {oid_name(strip)}: {error}") if failed else None)

        for number, (before, _, offset, old) in enumerate(steps):
            durable = number == len(steps) - 1
            if old:
                context.store.write(strip, offset, old, before, durable, written)
            else:
                context.store.stamp(strip, before, durable, written)

    def agree(self, strip: ObjectId, version: Version, origins: Buffer, adopt: bool, done: Done) -> None:
        """As ROLLBACK describes it."""
        if adopt:
            self.undo.drop(strip)
            self._context.store.stamp(strip, version, True, done)
        else:
            self.roll_back(strip, version, origins, done)
