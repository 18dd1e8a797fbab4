"""The strips of this node: applies numbered changes, with what is needed to take them back.

A change may have to read first (the bytes it replaces, the parity it is XORed into). Reads of the store may take a
while, so the changes and reads of one strip queue behind each other and take effect in the order in which they came.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Final

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import DiskError, NoObject, NoSpace, NoWayBack, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, NodeId, ObjectId, Version, oid_name, plain_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, LOOKED_BYTES, LOOKED_STRIPS
from sheepdog.cluster.core.messages import Buffer, Flag, Message
from sheepdog.cluster.core.origins import decode_origins
from sheepdog.cluster.core.ports import Done, NodeState, ReadDone
from sheepdog.cluster.core.strip_changes import StripChanges
from sheepdog.cluster.core.strip_levels import Leveled
from sheepdog.cluster.core.strip_undo import NO_STRIPS, Undo, UndoLog, touches_all
from sheepdog.cluster.core.striping import any_bytes

WHOLE_HISTORY: Final = 1 << 30  # versions kept: what was loaded is as short as its file


class _Look:
    """Bytes of a strip that was not changed since they were read; None: they are still being read."""

    __slots__ = ("data", "offset")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.data: Buffer | None = None


class _Queue:
    """Changes and reads of one strip, which come one after the other: what one of them brings about is behind all that
    wait already."""

    __slots__ = ("calls", "reading", "running")

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.running = False  # one of the calls
        self.reading = False  # for a change, which the others wait for


class _Levels:
    """Strips that are brought level; `done` gets those that could not be, when all have ended."""

    __slots__ = ("_done", "_failed", "_left")

    def __init__(self, count: int, done: Callable[[list[ObjectId]], None]) -> None:
        self._left = count
        self._done = done
        self._failed: list[ObjectId] = []

    def ended(self, strip: ObjectId, error: StoreError | None) -> None:
        self._left -= 1
        if error is not None:
            self._failed.append(strip)
        if not self._left:
            self._done(self._failed)


class StripReplica:
    """Of one node, over all epochs; `begin` starts a new one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.undo = UndoLog()
        self.changes = StripChanges()
        self._queues: dict[ObjectId, _Queue] = {}  # of strips that are being changed
        self._looked: dict[ObjectId, _Look] = {}

    def begin(self) -> None:
        """What has not been written yet never is: its home does not count any more."""
        self._queues = {}
        self._looked = {}

    def load(self, state: NodeState, version_of: Callable[[ObjectId], Version | None]) -> None:
        """What the process before this one has left; `version_of` tells where the strips are now."""
        self.undo.load(state, version_of)
        for strip, undo in self.undo.every_step():
            length = -1 if undo.old is None else len(undo.old)
            self.changes.note(strip, undo.before, undo.after, undo.offset, length)
            self.changes.mark(strip, undo.after, WHOLE_HISTORY)  # any of them may be the last that all strips had

    def clear(self) -> None:
        """The cluster was formatted."""
        self.changes.clear()
        self._queues = {}
        self._looked = {}
        self.undo.clear()

    def replaced(self, strip: ObjectId) -> None:
        """The strip is made anew, or goes."""
        self.undo.drop(strip)
        self._looked.pop(strip, None)

    def _keep(self, strip: ObjectId, undo: Undo) -> None:
        """Before the strip is written."""
        self.undo.keep(strip, undo)
        self.changes.note(strip, undo.before, undo.after, undo.offset, len(undo.old or b""))
        if touches_all(undo.touched) and self._has_all_strips(strip):
            self.changes.mark(strip, undo.after)

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

        `length`: size of a strip to create; else the strips that the change touches, a bit each.

        `taken` is called when the strip has it; until then it may still come to nothing, with the epoch.
        """
        queue = self._queues.get(strip)
        if queue is None:  # as mostly
            queue = self._queues[strip] = _Queue()
            queue.running = True
            self._perform(flags, strip, offset, length, data, version, taken, done)
            self._go_on(strip, queue)
        else:
            queue.calls.append(partial(self._perform, flags, strip, offset, length, data, version, taken, done))
            self._run(strip, queue)

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
        looked = self._looked.pop(strip, None)
        broken = self._context.spoilt.get(strip)
        if broken is not None and not flags & (Flag.CREATE | Flag.REMOVE):
            done(broken)
            return
        if flags & Flag.CREATE:
            self.undo.drop(strip)
            store.create(strip, length, offset, data, version, durable, done)
            self._note(strip, version, taken)
            return
        if flags & Flag.REMOVE:
            self.undo.drop(strip)
            self.changes.drop(strip)
            store.remove(strip, done)
            taken()
            return
        before = store.version(strip)
        if before is None or before == NO_VERSION:
            done(_missing(strip, before))
            return
        if not data:
            self._keep(strip, Undo(before, version, 0, b"", length))
            store.stamp(strip, version, durable, done)
            self._note(strip, version, taken)
            return

        if looked is not None and looked.offset == offset and looked.data is not None and len(looked.data) == len(data):
            self._replace(flags, strip, offset, length, data, before, version, taken, done, looked.data)
            return
        queue = self._queues[strip]
        queue.reading = True
        read = partial(self._read_for_change, queue, flags, strip, offset, length, data, before, version, taken, done)
        store.read(strip, offset, len(data), read)

    def _read_for_change(
        self,
        queue: _Queue,
        flags: int,
        strip: ObjectId,
        offset: int,
        length: int,
        data: Buffer,
        before: Version,
        version: Version,
        taken: Callable[[], None],
        done: Done,
        old: Buffer | StoreError,
    ) -> None:
        if self._queues.get(strip) is not queue:
            return  # another epoch has begun
        if isinstance(old, StoreError):
            done(old)
        else:
            self._replace(flags, strip, offset, length, data, before, version, taken, done, old)
        queue.reading = False
        self._run(strip, queue)

    def _replace(
        self,
        flags: int,
        strip: ObjectId,
        offset: int,
        length: int,
        data: Buffer,
        before: Version,
        version: Version,
        taken: Callable[[], None],
        done: Done,
        old: Buffer,
    ) -> None:
        """The bytes before the change are known: they can be undone. Blocks that become zeros take no space."""
        self._keep(strip, Undo(before, version, offset, old, length))
        fresh = self._context.coder.xor(old, data) if flags & Flag.XOR else data
        store, durable, size = self._context.store, bool(flags & Flag.DURABLE), len(fresh)
        if (offset | size) % BLOCK_SIZE or any_bytes(fresh):
            store.write(strip, offset, fresh, version, durable, done)
        else:
            store.punch(strip, offset, size, version, durable, done)
        self._note(strip, version, taken)

    def _note(self, strip: ObjectId, version: Version, taken: Callable[[], None]) -> None:
        """The store has taken the change or has failed, which it may say later.

        A strip that lacks a change takes no more of them and is not read, until it is made anew. What comes next would
        be computed from bytes that the parity does not stand for any more.
        """
        now = self._context.store.version(strip)
        if now == version:
            taken()
        else:
            self._context.spoilt.setdefault(strip, DiskError(f"strip {oid_name(strip)} lacks a write"))
            self.undo.went_back(strip, now or NO_VERSION)

    def _in_turn(self, strip: ObjectId, call: Callable[[], None]) -> None:
        """Calls when all changes of the strip that came before are made."""
        queue = self._queues.get(strip)
        if queue is None:
            queue = self._queues[strip] = _Queue()
        queue.calls.append(call)
        self._run(strip, queue)

    def _run(self, strip: ObjectId, queue: _Queue) -> None:
        """What waits, until something has to read first."""
        if not queue.running:
            queue.running = True
            self._go_on(strip, queue)

    def _go_on(self, strip: ObjectId, queue: _Queue) -> None:
        """Who calls has set `running`."""
        while queue.calls and not queue.reading and self._queues.get(strip) is queue:
            queue.calls.pop(0)()
        queue.running = False
        if not queue.reading and self._queues.get(strip) is queue:
            del self._queues[strip]

    def bring_level(self, levels: Sequence[Leveled], done: Callable[[list[ObjectId]], None]) -> None:
        """Strips get the version of the last write, which did not touch them; `done` gets those that cannot."""
        batch = _Levels(len(levels), done)
        for strip, version in levels:
            self._in_turn(strip, partial(self._level, strip, version, partial(batch.ended, strip)))

    def _level(self, strip: ObjectId, version: Version, done: Done) -> None:
        store = self._context.store
        before = store.version(strip)
        if before is None or before == NO_VERSION:
            done(NoObject(f"no strip {oid_name(strip)} here"))
            return
        broken = self._context.spoilt.get(strip)
        if broken is not None:  # its version says what it contains, also in another epoch
            done(broken)
            return
        if before < version:
            self._keep(strip, Undo(before, version, 0, b"", NO_STRIPS))
        if before <= version and self._has_all_strips(strip):
            self.changes.mark(strip, version)
        if before < version:
            self._stamp(strip, version, False, done)
        else:
            done(None)

    def _stamp(self, strip: ObjectId, version: Version, durable: bool, done: Done) -> None:
        """A version without a write; `_keep` has been called."""
        store = self._context.store
        store.stamp(strip, version, durable, done)
        if (now := store.version(strip)) != version:
            self.undo.went_back(strip, now or NO_VERSION)

    def _has_all_strips(self, strip: ObjectId) -> bool:
        """None is missing for want of nodes: who goes away now has what the others have."""
        oid = plain_oid(strip)
        policy = self._context.policy_of(oid)
        return policy is not None and len(self._context.placement.replicas(oid)) >= policy.strips

    # -- reads -------------------------------------------------------------------------------------------------

    def look(self, strip: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """Reads for the home, which mostly wants to change these bytes next: they are kept until a change comes."""
        self._looked[strip] = look = _Look(offset)
        if len(self._looked) > LOOKED_STRIPS:
            del self._looked[next(iter(self._looked))]

        def read(data: Buffer | StoreError) -> None:
            if not isinstance(data, StoreError) and length <= LOOKED_BYTES:
                look.data = data  # no use if a change came meanwhile: then nobody finds it any more
            done(data)

        self.read(strip, offset, length, read)

    def read(self, strip: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """Sees every change that came before; DiskError if one of them failed."""
        if strip in self._queues and strip not in self._context.spoilt:
            self._in_turn(strip, partial(self._read, strip, offset, length, done))
        else:
            self._read(strip, offset, length, done)

    def _read(self, strip: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """When its turn has come: a change before it may have failed."""
        if strip in self._context.spoilt:
            done(self._context.spoilt[strip])
        else:
            self._context.store.read(strip, offset, length, done)

    def on_fetch(self, sender: NodeId, message: Message) -> None:
        """The home wants the present bytes, whatever their version. STALE_OBJ: they lack a write, but are not bad."""
        context = self._context

        def done(data: Buffer | StoreError) -> None:
            if isinstance(data, StoreError):
                lacks = message.oid in context.spoilt
                context.peers.answer(sender, message, Result.STALE_OBJ if lacks else data.result)
            else:
                context.counters.peer_reads += 1
                context.counters.peer_tx += len(data)
                context.peers.answer(sender, message, Result.SUCCESS, data)

        self.look(message.oid, message.offset, message.length, done)

    # -- going back --------------------------------------------------------------------------------------------

    def agree(
        self, strip: ObjectId, target: Version, version: Version, origins: Buffer, as_is: bool, done: Done
    ) -> None:
        """The strip becomes what it was at `target`, durably, and gets a new version. NoSpace: it can do so later.

        `origins`: the writes that it contains then; `as_is`: it stays what it is, and contains what it did.
        Until all strips have come so far it can be told from the steps here what it was.
        """
        context = self._context
        if context.store.version(strip) == version:  # asked again, in a later epoch
            done(None)
            return
        steps = self.undo.back_to(strip, target, context.store.version(strip))
        if steps is None:
            done(NoWayBack(f"strip {oid_name(strip)} cannot go back to {tuple(target)}"))
            return
        if not as_is:
            context.origins.forget(plain_oid(strip))  # also writes that only some strips have
            context.origins.merge(decode_origins(origins))
        self._go_back(strip, steps, partial(self._agree_upon, strip, target, version, done), done)

    def _agree_upon(self, strip: ObjectId, target: Version, version: Version, done: Done) -> None:
        def stamped(error: StoreError | None) -> None:
            if error is not None and not isinstance(error, NoSpace):
                self._cannot_go_back(strip, error, done)
            else:
                done(error)

        self._keep(strip, Undo(target, version, 0, b""))
        self._stamp(strip, version, True, stamped)

    def take_back(self, strip: ObjectId, cut: Version, done: Done) -> None:
        """The strip becomes what it was before the write `cut`, durably. NoSpace: it can do so later."""
        context = self._context
        version = context.store.version(strip)
        if version is None or version == NO_VERSION:
            done(_missing(strip, version))
            return
        context.origins.undo(plain_oid(strip), cut)
        steps = self.undo.back_to(strip, self.undo.before(strip, cut, version), version)
        if steps is None or (steps[-1].before if steps else version) >= cut:
            self._cannot_go_back(strip, NoWayBack(f"before {tuple(cut)}"), done)
        else:
            self._go_back(strip, steps, partial(done, None), done)

    def _go_back(self, strip: ObjectId, steps: Sequence[Undo], end: Callable[[], None], done: Done) -> None:
        """Undoes writes, the newest first, and then calls `end`; or `done`, with why not."""
        if not steps:
            end()
            return
        undo, old = steps[0], steps[0].old or b""
        self._context.probe("strips.rolled_back")
        self._looked.pop(strip, None)
        self.changes.note(strip, undo.after, undo.before, undo.offset, len(old))
        gone_back = partial(self._gone_back, self._context.fence, strip, steps, end, done)
        self.undo_step(strip, undo.before, undo.offset, old, gone_back)
        if self._context.store.version(strip) == undo.before:
            self.undo.went_back(strip, undo.before)

    def _gone_back(
        self,
        fence: int,
        strip: ObjectId,
        steps: Sequence[Undo],
        end: Callable[[], None],
        done: Done,
        error: StoreError | None,
    ) -> None:
        """The first of the steps is undone, or has failed."""
        if self._context.fence != fence:
            return  # another home says how far
        if error is None:
            self._go_back(strip, steps[1:], end, done)
        elif isinstance(error, NoSpace) and self._context.store.version(strip) == steps[0].after:
            done(error)
        else:
            self._cannot_go_back(strip, error, done)

    def _cannot_go_back(self, strip: ObjectId, error: StoreError, done: Done) -> None:
        """What the strip is now nobody knows: it is to be made anew."""
        self.undo.drop(strip)
        found = NoWayBack(f"strip {oid_name(strip)} cannot go back: {error}")
        self._context.spoilt.setdefault(strip, found)
        done(found)

    def undo_step(self, strip: ObjectId, before: Version, offset: int, old: Buffer, done: Done) -> None:
        """Takes back one write."""
        if old:
            self._context.store.write(strip, offset, old, before, True, done)
        else:
            self._context.store.stamp(strip, before, True, done)


def _missing(strip: ObjectId, before: Version | None) -> StoreError:
    if before is None:
        return NoObject(f"no strip {oid_name(strip)} here")
    return DiskError(f"strip {oid_name(strip)} is not whole here")  # its disk has gone: it will be made anew
