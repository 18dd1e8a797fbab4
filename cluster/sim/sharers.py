"""Clients that have one thin volume open at a time, each behind a gateway of its own (protocol.md 8.6).

Each does what `client.shared` does: it holds a shared lock, keeps a map of its own, reads lock and map again when it
is told that its map is old, and when its gateway was gone. The blocks of an object belong to different clients, so
what each of them writes is ordered; whole objects are given back only while nobody writes to them. What one was told
is written, all read: every block is a register (cluster.sim.history), and a snapshot is a read of all of them at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_END, InodeHeader, map_offset, unpack_map
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.script import Script
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import LOST, OBJECT_BYTES, Answer, Door, block_of, value_of
from sheepdog.cluster.sim.cluster import Process, SimCluster
from sheepdog.cluster.sim.history import INITIAL, NEVER, History, Operation, Violation
from sheepdog.cluster.sim.volumes import Asking, Image, take_snapshot
from sheepdog.cluster.sim.world import MILLISECOND

_BLOCKS = OBJECT_BYTES // BLOCK_SIZE
_PROBE_BYTES = 512  # of an inode: no length by which a gateway takes the map for read
_STALE = (Result.INODE_INVALIDATED, Result.READONLY, Result.NO_OBJ, LOST)  # lock and map come first
_MAX_ROUNDS = 400  # of one access: each ends with a snapshot, another one's change or a lost gateway
_THINK_NS = 20 * MILLISECOND

Call: TypeAlias = Callable[[Gateway, Answer], None]
Place: TypeAlias = tuple[int, int]  # object, block


@dataclass(slots=True)
class _Write:
    """Of one block; also a discard, which has a value of its own that is read as zeros."""

    value: int
    is_zero: bool
    start_ns: int
    end_ns: int = NEVER


@dataclass
class Shared:
    """The volume, and what all know of it."""

    name: str
    objects: int
    history: History
    values: list[int]  # shared counter: [last value given out]
    blocks: tuple[int, ...] = ()
    writing: dict[int, int] = field(default_factory=dict)  # by object: writes under way
    discarding: dict[int, None] = field(default_factory=dict)
    _writes: dict[Place, list[_Write]] = field(default_factory=dict)  # in order

    def begin(self, place: Place, is_zero: bool, now_ns: int) -> _Write:
        self.values[0] += 1
        write = _Write(self.values[0], is_zero, now_ns)
        self._writes.setdefault(place, [_Write(INITIAL, True, -1, -1)]).append(write)
        return write

    def end(self, place: Place, write: _Write, who: str, end_ns: int) -> None:
        """NEVER: its gateway was lost."""
        write.end_ns = end_ns
        self._note(place, Operation(True, write.value, write.start_ns, end_ns, who, durable=end_ns < NEVER))

    def seen(self, place: Place, value: int, who: str, start_ns: int, end_ns: int) -> None:
        """A read. Zeros are those of the last discard before it; where it may be of either of two, it says nothing."""
        if value == INITIAL:
            zeros = self._possible_zeros(place, start_ns, end_ns)
            if not zeros:
                raise Violation(f"{self.name}, block {place}: {who} has read zeros where something was written")
            if len(zeros) > 1:
                return
            value = zeros[0]
        self._note(place, Operation(False, value, start_ns, end_ns, who))

    def frozen(self, place: Place, value: int, who: str, start_ns: int, end_ns: int) -> None:
        """A snapshot that was taken in this time has it. What was under way then may have reached the frozen map, and
        is there for those who read the volume itself only when it has ended (protocol.md 8.4)."""
        late = [one for one in self._writes.get(place, ()) if one.start_ns <= end_ns < one.end_ns]
        if not any(one.value == value or (value == INITIAL and one.is_zero) for one in late):
            self.seen(place, value, who, start_ns, end_ns)

    def _possible_zeros(self, place: Place, start_ns: int, end_ns: int) -> list[int]:
        writes = [one for one in self._writes.get(place, [_Write(INITIAL, True, -1, -1)]) if one.start_ns <= end_ns]
        last = max((i for i, one in enumerate(writes) if one.end_ns < start_ns), default=0)
        return [one.value for one in writes[last:] if one.is_zero]

    def _note(self, place: Place, operation: Operation) -> None:
        self.history.add((self.name, place[0] * _BLOCKS + place[1]), operation)

    def power_failed_since(self, start_ns: int) -> bool:
        """Everywhere: no access may reach over that."""
        return bool(self.history.blackouts) and self.history.blackouts[-1] >= start_ns

    def settled(self, before_ns: int) -> bool:
        """No write that began by then is under way."""
        return all(one.end_ns < NEVER or one.start_ns > before_ns for own in self._writes.values() for one in own[-1:])


def blocks_of(number: int) -> tuple[int, ...]:
    """Those that the client with this number writes, of every object."""
    return number, _BLOCKS - 1 - number


class _OwnDoor(Door):
    """To one gateway only: another one knows nothing of this client's share."""

    def __init__(self, cluster: SimCluster, number: int) -> None:
        super().__init__(cluster, f"sharer{number}", number)
        self._home = cluster.machines[number]

    def process(self) -> Process | None:
        return self._home.process


class Sharer(Asking):
    """See the module. At most one for each gateway."""

    def __init__(self, cluster: SimCluster, number: int, shared: Shared) -> None:
        super().__init__(_OwnDoor(cluster, number))
        self.operations = 0
        self._shared = shared
        self._blocks = blocks_of(number)
        self._session: Process | None = None  # the gateway that knows of us
        self._vid = Vid(0)
        self._entries: list[int] = []

    def _live(self) -> Script[None]:
        while not self.stopped:
            yield from self.pause(self.random.randrange(_THINK_NS))
            index = self.random.randrange(self._shared.objects)
            self.operations += 1
            chance = self.random.random()
            if chance < 0.5:
                yield from self._read_and_note(index, self.random.choice(self._shared.blocks))
            elif chance < 0.9:
                yield from self._write_and_note(index, self.random.choice(self._blocks))
            else:
                yield from self._discard_and_note(index)

    def check_all(self) -> Script[None]:
        for index in range(self._shared.objects):
            for block in self._shared.blocks:
                yield from self._read_and_note(index, block)

    # -- what is noted

    def _read_and_note(self, index: int, block: int) -> Script[None]:
        found: list[tuple[int, int]] = []
        yield from self._repeated(lambda: self._read(index, block, found))
        value, start_ns = found[-1]
        self._shared.seen((index, block), value, self.door.name, start_ns, self.world.now_ns)

    def _write_and_note(self, index: int, block: int) -> Script[None]:
        shared = self._shared
        while index in shared.discarding:
            yield from self.pause(MILLISECOND)
        shared.writing[index] = shared.writing.get(index, 0) + 1
        yield from self._until_done(
            [(index, block)], False, lambda value: self._write(index, block * BLOCK_SIZE, block_of(value))
        )
        shared.writing[index] -= 1

    def _discard_and_note(self, index: int) -> Script[None]:
        shared = self._shared
        if index in shared.discarding:
            return
        shared.discarding[index] = None
        while shared.writing.get(index):
            yield from self.pause(MILLISECOND)
        yield from self._until_done([(index, block) for block in shared.blocks], True, lambda _: self._discard(index))
        del shared.discarding[index]

    def _until_done(self, places: list[Place], is_zero: bool, attempt: Callable[[int], Script[int]]) -> Script[None]:
        """A write whose gateway was lost may be done at any time, or never: then it is done with another value."""
        shared, who = self._shared, self.door.name
        done = False
        while not done:
            writes = [shared.begin(place, is_zero, self.world.now_ns) for place in places]
            value = writes[0].value
            done = yield from self._repeated(partial(attempt, value), once=True)
            done = done and not shared.power_failed_since(writes[0].start_ns)
            for place, write in zip(places, writes, strict=True):
                shared.end(place, write, who, self.world.now_ns if done else NEVER)

    # -- as client.shared does it

    def _repeated(self, attempt: Callable[[], Script[int]], once: bool = False) -> Script[bool]:
        """Until an attempt was made with a map that is current; False (only with `once`) when the gateway was lost."""
        for _ in range(_MAX_ROUNDS):
            if self._session is None and not (yield from self._connect()):
                yield from self.pause(5 * MILLISECOND)
                continue
            result = yield from attempt()
            if not result:
                return True
            if result not in _STALE:
                raise Violation(f"{self.door.name}: result {result:#x}")
            self._session = None
            if result == LOST and once:
                return False
        raise Violation(f"{self.door.name}: its map is always an old one")

    def _connect(self) -> Script[bool]:
        """Lock and map."""

        def lock(process: Process, done: Answer) -> None:
            self._session = process
            process.node.operations.lock_vdi(self._shared.name.encode(), b"", 0, True, done)

        result, record = yield from self.ask(lock, once=True)
        if result == LOST:
            self._session = None
            return False
        if result or not isinstance(record, VdiRecord):
            raise Violation(f"{self.door.name}: locking {self._shared.name}: result {result:#x}")
        oid = inode_oid(record.vid)
        result, data = yield from self._ask(oid, 0, MAP_END, lambda g, done: g.read(oid, 0, MAP_END, done))
        if result:
            self._session = None
            return False
        self._vid = Vid(InodeHeader.unpack(data[:HEADER_SIZE]).vdi_id)
        start = map_offset(0)
        self._entries = list(unpack_map(data[start : start + 4 * self._shared.objects]))
        return True

    def _ask(self, oid: ObjectId, offset: int, length: int, call: Call) -> Script[tuple[int, Buffer]]:
        """`length` is 0 for a change."""

        def request(process: Process, done: Answer) -> None:
            if process is not self._session:
                done(LOST, b"")
            elif not process.node.gateway.read_invalidated(oid, offset, length, done, follows=True):
                call(process.node.gateway, done)

        answer: tuple[int, Buffer] = yield from self.ask(request, once=True)
        return answer

    def _read_inode(self, length: int) -> Script[tuple[int, Buffer]]:
        oid = inode_oid(self._vid)
        return self._ask(oid, 0, length, lambda g, done: g.read(oid, 0, length, done))

    def _read(self, index: int, block: int, found: list[tuple[int, int]]) -> Script[int]:
        """Adds the value, and since when this attempt has been under way."""
        owner, value, result, start_ns = Vid(self._entries[index]), INITIAL, 0, self.world.now_ns
        if owner:
            oid, offset = data_oid(owner, index), block * BLOCK_SIZE
            result, data = yield from self._ask(
                oid, offset, BLOCK_SIZE, lambda g, done: g.read(oid, offset, BLOCK_SIZE, done)
            )
            if not result:
                value = value_of(data, f"{oid:016x} block {block}")
        if not result and owner != self._vid:
            result, _ = yield from self._read_inode(_PROBE_BYTES)
        found.append((value, start_ns))
        return result

    def _write(self, index: int, offset: int, data: bytes) -> Script[int]:
        owner, vid = Vid(self._entries[index]), self._vid
        oid = data_oid(vid, index)
        if owner == vid:
            result, _ = yield from self._ask(oid, offset, 0, lambda g, done: g.write(oid, offset, data, True, done))
            return result
        source = data_oid(owner, index) if owner else ObjectId(0)
        result, _ = yield from self._ask(
            oid, offset, 0, lambda g, done: g.create(oid, source, offset, data, True, done)
        )
        return result or (yield from self._put_entry(index, vid))

    def _discard(self, index: int) -> Script[int]:
        if not self._entries[index]:
            result, _ = yield from self._read_inode(_PROBE_BYTES)
            return result
        return (yield from self._is_frozen()) or (yield from self._put_entry(index, Vid(0)))

    def _put_entry(self, index: int, entry: Vid) -> Script[int]:
        oid, data = inode_oid(self._vid), entry.to_bytes(4, "little")
        result, _ = yield from self._ask(
            oid, map_offset(index), 0, lambda g, done: g.write(oid, map_offset(index), data, True, done)
        )
        if result:
            return result
        self._entries[index] = entry
        return (yield from self._is_frozen())

    def _is_frozen(self) -> Script[int]:
        """A map write may reach an inode that a snapshot has just frozen, which nobody looks into again."""
        result, data = yield from self._read_inode(HEADER_SIZE)
        if result:
            return result
        return int(Result.READONLY) if InodeHeader.unpack(data).is_snapshot else 0


class SharedSnapshotter(Asking):
    """Takes snapshots while all of them write."""

    def __init__(self, door: Door, shared: Shared) -> None:
        super().__init__(door)
        self._shared = shared
        self._images: list[tuple[Image, dict[Place, int]]] = []

    def _live(self) -> Script[None]:
        while not self.stopped:
            yield from self.pause(self.random.randrange(300 * MILLISECOND))
            yield from self._snapshot()

    def _snapshot(self) -> Script[None]:
        shared, start_ns = self._shared, self.world.now_ns
        image = yield from take_snapshot(self, shared.name.encode(), shared.objects)
        end_ns = self.world.now_ns
        if image is None:
            return
        while not shared.settled(end_ns):
            yield from self.pause(5 * MILLISECOND)  # what was under way may still reach the frozen map (8.4)
        content = yield from self._content(image)
        for place, value in () if shared.power_failed_since(start_ns) else content.items():
            shared.frozen(place, value, f"snapshot {image.snap_id}", start_ns, end_ns)
        self._images.append((image, content))

    def _content(self, image: Image) -> Script[dict[Place, int]]:
        entries = yield from self.read_map(image.vid, self._shared.objects)
        content: dict[Place, int] = {}
        for index in range(self._shared.objects):
            for block in self._shared.blocks:
                content[index, block] = yield from self.read_block(entries, index, block)
        return content

    def check_all(self) -> Script[None]:
        for image, content in self._images:
            if (yield from self._content(image)) != content:
                raise Violation(f"snapshot {image.snap_id} of {self._shared.name} has changed")
