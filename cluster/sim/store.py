"""Simulated disks: `ports.Store` in memory, with what a crash would leave of it.

Each object has a *base* (on the platter), a log of changes since, and the volatile copy that reads see. A change in
the log is *acknowledged* (in the operating system's hands) or not, and may be durable. A crash keeps a prefix of the
log: with `kill -9` all that was acknowledged, with a power loss all that was durable, and in both a random part of
the rest. Changes take effect in call order; callbacks come at once or after a random while, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from sheepdog.cluster.core.errors import Corrupt, DiskError, NoObject, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, Vid, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done, ReadDone, Store
from sheepdog.cluster.sim.copy import Copy
from sheepdog.cluster.sim.world import MICROSECOND, MILLISECOND, Life, World

Change = Callable[[Copy | None], Copy | None]
"""Applies one change to a copy (None: there is none) and returns what is there afterwards."""


class OutOfRange(StoreError):
    result = Result.INVALID_PARMS


class _Entry:
    """One change that is not known to be on the platter."""

    __slots__ = ("acknowledged", "change", "loose", "undo")

    def __init__(self, change: Change, undo: int, loose: bool = False) -> None:
        self.change = change
        self.loose = loose  # a crash may leave it out although it leaves later ones
        self.undo = undo  # so much undo was written before it, and is durable if this is
        self.acknowledged = False


class _Object:
    __slots__ = ("base", "copy", "log")

    def __init__(self) -> None:
        self.base: Copy | None = None
        self.copy: Copy | None = None
        self.log: list[_Entry] = []


class SimDisk:
    """The objects of one node; outlives its processes. `fault` says what goes wrong with changes from now on."""

    def __init__(self, world: World, name: str) -> None:
        self.random: Random = world.stream(f"disk {name}")
        self.objects: dict[ObjectId, _Object] = {}
        self.fault: Callable[[str], StoreError | None] | None = None
        self.fault_chance = 0.0
        self.late: Callable[[str], StoreError] | None = None  # what a change that was taken says in the end ...
        self.late_chance = 0.0  # ... so often: nobody knows then whether it is there
        self.slow = 1  # factor of all delays
        self.nosync = False  # as it is told; what is durable is so nevertheless
        self.capacity_bytes = 1 << 40  # as it is told; `fault` says what fails
        self.undo_written = 0  # bytes (ports.NodeState.append_undo) ...
        self.undo_durable = 0  # ... of which a change that is durable needs so many

    def crash(self, power: bool) -> None:
        """The process was killed (or power failed): what the next process will find."""
        for oid in list(self.objects):
            entry = self.objects[oid]
            log = entry.log
            keep = 0
            if not power:
                keep = max((index + 1 for index, change in enumerate(log) if change.acknowledged), default=0)
            keep = self.random.randint(keep, len(log)) if keep < len(log) else keep
            log = entry.log = [change for change in log[:keep] if not change.loose or self.random.random() < 0.5]
            copy = None if entry.base is None else entry.base.clone()
            for change in log:
                copy = change.change(copy)
                change.acknowledged = True  # what the next process sees, another kill does not take away
                change.loose = False
            entry.copy = copy
            if power:
                self.undo_durable = max([self.undo_durable, *(change.undo for change in log)])
                entry.base = None if copy is None else copy.clone()
                log.clear()
            if entry.copy is None and entry.base is None and not log:
                del self.objects[oid]

    def lose(self) -> list[ObjectId]:
        """One of the node's disks goes, with half of the objects; they are named, without a version."""
        lost = [
            oid for oid, entry in sorted(self.objects.items()) if entry.copy is not None and self.random.random() < 0.5
        ]
        for oid in lost:
            entry = self.objects[oid] = _Object()
            entry.base, entry.copy = Copy(-1, NO_VERSION), Copy(-1, NO_VERSION)
        return lost

    def take_away_lost(self) -> None:
        """The disk that went is not there any more when the node starts again, and what was on it not even named."""
        for oid, entry in sorted(self.objects.items()):
            if entry.copy is not None and entry.copy.size < 0 and not entry.log:
                del self.objects[oid]

    def lose_while_down(self) -> int:
        """One of the node's disks is not there when it starts again, and half of the objects with it; how many."""
        lost = [oid for oid in sorted(self.objects) if self.random.random() < 0.5]
        for oid in lost:
            del self.objects[oid]
        return len(lost)

    def wipe(self) -> None:
        """Another, empty disk."""
        self.objects.clear()
        self.undo_written = self.undo_durable = 0

    def heal(self) -> None:
        """Nothing goes wrong with it any more; what has rotted stays so."""
        self.fault = self.late = None
        self.slow = 1

    def rot(self, oid: ObjectId, block: int) -> None:
        """One block changes by itself."""
        entry = self.objects[oid]
        for copy in (entry.copy, entry.base):
            if copy is not None and block in copy.blocks:
                copy.rotten[block] = None

    def copies(self) -> dict[ObjectId, Copy]:
        """What is here, ascending by oid."""
        return {oid: entry.copy for oid, entry in sorted(self.objects.items()) if entry.copy is not None}


class SimStore(Store):
    """`ports.Store` of one process over a disk."""

    def __init__(self, disk: SimDisk, world: World, life: Life) -> None:
        self._life = life
        self._disk = disk
        self._world = world
        self._random, self.nosync = disk.random, disk.nosync

    # -- what is here ----------------------------------------------------------------------------------------------

    def _copy(self, oid: ObjectId) -> Copy | None:
        entry = self._disk.objects.get(oid)
        return None if entry is None else entry.copy

    def version(self, oid: ObjectId) -> Version | None:
        copy = self._copy(oid)
        return None if copy is None else copy.version

    def inventory(self) -> Iterable[tuple[ObjectId, Version]]:
        return [(oid, copy.version) for oid, copy in self._disk.copies().items()]

    def _find(self, oid: ObjectId) -> Copy:
        copy = self._copy(oid)
        if copy is None:
            raise NoObject(f"no copy of {oid:016x} here")
        return copy

    def size(self, oid: ObjectId) -> int:
        return self._find(oid).size

    def table(self, oid: ObjectId) -> bytes:
        copy = self._find(oid)
        if copy.size < 0:
            raise DiskError(f"the disk of {oid:016x} is out of service")
        return copy.table()

    def usage(self) -> tuple[int, int]:
        used = sum(len(copy.blocks) for copy in self._disk.copies().values()) * BLOCK_SIZE
        return used, max(0, self._disk.capacity_bytes - used)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """The bytes are those at the call or at a moment before `done`: a real read takes a while, too."""
        if self._random.random() < 0.6:
            done(self._read(oid, offset, length))
            return
        early = self._read(oid, offset, length) if self._random.random() < 0.5 else None

        def later() -> None:
            done(early if early is not None else self._read(oid, offset, length))

        self._later(later, MILLISECOND)

    def _read(self, oid: ObjectId, offset: int, length: int) -> bytes | StoreError:
        copy = self._copy(oid)
        if copy is None:
            return NoObject(f"no copy of {oid:016x} here")
        if copy.size < 0:
            return DiskError(f"the disk of {oid:016x} is out of service")
        if offset < 0 or length <= 0 or offset + length > copy.size:
            return OutOfRange(f"{offset}+{length} is not inside {oid:016x}")
        bad = copy.bad(offset, length)
        return Corrupt(f"{oid:016x}: blocks {list(bad)} are corrupt here", bad) if bad else copy.read(offset, length)

    def verify(self, oid: ObjectId, offset: int, length: int, done: Done) -> None:
        def later() -> None:
            found = self._read(oid, offset, length)
            done(found if isinstance(found, StoreError) else None)

        self._later(later, MILLISECOND)

    # -- changing --------------------------------------------------------------------------------------------------

    def _later(self, call: Callable[[], None], spread_ns: int) -> None:
        chance = self._random.random()
        delay_ns = 10 * MICROSECOND + int(chance**4 * spread_ns * 4) * self._disk.slow
        self._world.after(delay_ns, lambda: self._life.do(self, call))

    def _fault(self) -> StoreError | None:
        disk = self._disk
        if disk.fault is not None and self._random.random() < disk.fault_chance:
            return disk.fault("injected")
        return None

    def _late_fault(self) -> StoreError | None:
        late = self._disk.late
        return late("late") if late is not None and self._random.random() < self._disk.late_chance else None

    def _change(self, oid: ObjectId, change: Change, durable: bool, done: Done, may_fail: bool = True) -> None:
        """Takes effect now; `done` when acknowledged, and durable if asked; or with an error after all."""
        entry = self._disk.objects.get(oid)
        if entry is None:
            entry = self._disk.objects[oid] = _Object()
        entry.copy = change(entry.copy)
        logged = _Entry(change, self._disk.undo_written)
        entry.log.append(logged)
        late = self._late_fault() if may_fail and self._disk.late is not None else None

        def acknowledge() -> None:
            if late is not None:
                done(late)
                return
            if self._disk.objects.get(oid, entry) is not entry:
                done(DiskError(f"the disk of {oid:016x} is out of service"))  # it went meanwhile
                return
            logged.acknowledged = True
            if durable:
                self._settle(oid, entry, logged)
            done(None)

        if late is None and not durable and self._random.random() < 0.5:
            acknowledge()
        else:
            self._later(acknowledge, 3 * MILLISECOND if durable else MILLISECOND)

    def _settle(self, oid: ObjectId, entry: _Object, last: _Entry) -> None:
        """The changes up to `last` are on the platter."""
        if last not in entry.log:
            return  # a flush has done it already
        count = entry.log.index(last) + 1
        self._disk.undo_durable = max([self._disk.undo_durable, *(logged.undo for logged in entry.log[:count])])
        if count == len(entry.log):
            entry.base = None if entry.copy is None else entry.copy.clone()
        else:
            for logged in entry.log[:count]:
                entry.base = logged.change(entry.base)
        del entry.log[:count]
        if entry.base is None and entry.copy is None and not entry.log and self._disk.objects.get(oid) is entry:
            del self._disk.objects[oid]

    def _writable(self, oid: ObjectId, offset: int, length: int) -> StoreError | None:
        copy = self._copy(oid)
        if copy is None:
            return NoObject(f"no copy of {oid:016x} here")
        if copy.size < 0:
            return DiskError(f"the disk of {oid:016x} is out of service")
        if copy.version == NO_VERSION:
            return NoObject(f"the copy of {oid:016x} here is being restored")
        if offset < 0 or offset + length > copy.size:
            return OutOfRange(f"{offset}+{length} is not inside {oid:016x}")
        edges = [offset] if offset % BLOCK_SIZE else []
        if (offset + length) % BLOCK_SIZE and offset + length != copy.size:
            edges.append(offset + length - 1)
        bad = [edge // BLOCK_SIZE for edge in edges if edge // BLOCK_SIZE in copy.rotten]
        return Corrupt(f"{oid:016x}: blocks {bad} are corrupt here", tuple(bad)) if bad else self._fault()

    def write(self, oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        error = self._writable(oid, offset, len(data))
        if error is not None:
            self._fail(error, done)
            return False
        kept = bytes(data)

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.overwrite(offset, kept)
            copy.version = version
            return copy

        self._change(oid, change, durable, done)
        return self.version(oid) == version

    def keep(self, oid: ObjectId, offset: int, data: Buffer) -> bool:
        if self._writable(oid, offset, len(data)) is not None or self._random.random() < 0.1:
            return False
        kept, entry = bytes(data), self._disk.objects[oid]

        def change(copy: Copy | None) -> Copy | None:
            if copy is not None:
                copy.overwrite(offset, kept)
            return copy

        entry.copy = change(entry.copy)
        entry.log.append(_Entry(change, self._disk.undo_written, loose=True))
        return True

    def when_answered(self, call: Callable[[], None]) -> None:
        """Until then anything may happen."""
        self._later(call, MICROSECOND if self._random.random() < 0.5 else MILLISECOND)

    def _fail(self, error: StoreError, done: Done) -> None:
        if self._random.random() < 0.5:
            done(error)
        else:
            self._later(lambda: done(error), MILLISECOND)

    def create(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool, done: Done
    ) -> None:
        error = self._fault()
        if offset < 0 or size <= 0 or offset + len(data) > size:
            error = OutOfRange(f"{offset}+{len(data)} is not inside {oid:016x} of {size} bytes")
        if error is not None:
            self._fail(error, done)
            return
        kept = bytes(data)

        def change(_: Copy | None) -> Copy | None:
            copy = Copy(size, version)
            copy.overwrite(offset, kept, skip_zero_blocks=True)
            return copy

        self._change(oid, change, True, done)

    def punch(self, oid: ObjectId, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        error = self._writable(oid, offset, length)
        if error is not None:
            self._fail(error, done)
            return

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.punch(offset, length)
            copy.version = version
            return copy

        self._change(oid, change, durable, done)

    def stamp(self, oid: ObjectId, version: Version, durable: bool, done: Done) -> None:
        error = self._writable(oid, 0, 0)
        if error is not None:
            self._fail(error, done)
            return

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.version = version
            return copy

        self._change(oid, change, durable, done)

    def remove(self, oid: ObjectId, done: Done) -> None:
        if self._copy(oid) is None:
            done(None)
        else:
            self._change(oid, lambda _: None, True, done, may_fail=False)

    def flush(self, vids: frozenset[Vid] | None, done: Done) -> None:
        marks = [
            (oid, entry, entry.log[-1])
            for oid, entry in sorted(self._disk.objects.items())
            if entry.log and (vids is None or vid_of(oid) in vids)
        ]
        if not marks:
            done(None)
            return
        error = self._fault()

        def flushed() -> None:
            if error is None:
                for oid, entry, last in marks:
                    self._settle(oid, entry, last)
            done(error)

        self._later(flushed, 5 * MILLISECOND)

    # -- restoring -------------------------------------------------------------------------------------------------

    def restore_begin(self, oid: ObjectId, size: int) -> StoreError | None:
        there = self._copy(oid)
        error = self._fault() if there is None or there.size != size else None
        if error is not None:
            return error

        def change(copy: Copy | None) -> Copy | None:
            if copy is None or copy.size != size:
                return Copy(size, NO_VERSION)
            copy.version = NO_VERSION
            return copy

        self._change(oid, change, False, _ignore)
        return None

    def restore_write(self, oid: ObjectId, offset: int, data: Buffer, done: Done) -> None:
        error: StoreError | None = NoObject(f"no copy of {oid:016x} here") if self._copy(oid) is None else self._fault()
        if error is not None:
            self._fail(error, done)
            return
        kept = bytes(data)

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.overwrite(offset, kept)
            return copy

        self._change(oid, change, False, done)

    def restore_punch(self, oid: ObjectId, offset: int, length: int) -> None:
        if self._copy(oid) is None:
            return

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.punch(offset, length)
            return copy

        self._change(oid, change, False, _ignore)

    def restore_finish(self, oid: ObjectId, version: Version, done: Done) -> None:
        error = NoObject(f"no copy of {oid:016x} here") if self._copy(oid) is None else self._fault()
        if error is not None:
            self._fail(error, done)
            return

        def change(copy: Copy | None) -> Copy | None:
            assert copy is not None
            copy.version = version
            return copy

        self._change(oid, change, True, done)


def _ignore(_: StoreError | None) -> None:
    """Nobody waits for it."""
