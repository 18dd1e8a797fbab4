"""Simulated owners of volumes: thin volumes with copy-on-write, discards, snapshots, clones and deletion.

An owner does what QEMU does: it keeps the object map in memory, creates an object at its first write and then
writes the map entry, and goes on with the new working VDI when a write is answered READONLY. It is alone with its
volume, so it knows what every block must hold; whoever takes snapshots beside it knows only when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset, unpack_map
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.script import Script, run
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import LOST, NOT_NOW, OBJECT_BYTES, RETRY_NS, SHIFT, Answer, Door, block_of, value_of
from sheepdog.cluster.sim.cluster import Process
from sheepdog.cluster.sim.history import INITIAL, Violation
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

Content: TypeAlias = dict[tuple[int, int], int]  # (object index, block) -> value; what is not named is INITIAL
Act: TypeAlias = tuple[float, Callable[[], Script[None]]]  # how often, and what
Request: TypeAlias = Callable[[Process, Answer], None]

RETRIED = (*NOT_NOW, Result.EIO, Result.NO_SPACE, Result.VDI_READ, Result.VDI_WRITE)
# EIO also while all current copies of something are away; a real client would see it, this one waits.
BASE_TROUBLE = (Result.BASE_VDI_READ, Result.BASE_VDI_WRITE)


@dataclass(slots=True)
class Image:
    """A frozen VDI and what it must hold for ever: one of these (which, is known once it has been read)."""

    name: bytes
    vid: Vid
    snap_id: int
    candidates: list[Content]


@dataclass(slots=True)
class Progress:
    """What an owner has done: `states[n]` is the content after n changes; `begun` of them are at least under way."""

    states: list[Content] = field(default_factory=lambda: [{}])
    begun: int = 0

    @property
    def ended(self) -> int:
        return len(self.states) - 1


class Asking:
    """Scripts that talk to the cluster through a door, and do not give up."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.world = door.cluster.world
        self.random = door.random
        self.lost = False  # the last request's gateway died before it answered
        self.doubtful = False  # or an earlier try failed: what was asked may have been done before
        self.stopped = False  # set to have it end with the operation under way
        self.ended = False

    @property
    def idle(self) -> bool:
        return self.ended

    def start(self) -> None:
        def finished(_: None) -> None:
            self.ended = True

        run(self._live(), finished)

    def _live(self) -> Script[None]:
        raise NotImplementedError

    def check_all(self) -> Script[None]:
        """Everything once more, at the end."""
        raise NotImplementedError

    def ask(
        self, request: Request, retried: tuple[Result, ...] = RETRIED, once: bool = False
    ) -> Script[tuple[int, Any]]:
        """Asks until there is an answer that says something. `once`: not again when the gateway died over it."""
        self.lost = self.doubtful = False
        while True:
            result, value = yield lambda done: self.door.ask(request, done)
            self.doubtful |= bool(result) and result in (LOST, *retried)
            if result == LOST:
                self.lost = True
                if once:
                    return LOST, None
            elif result not in retried:
                return int(result), value
            yield from self.pause(RETRY_NS)

    def pause(self, delay_ns: int) -> Script[None]:
        def wait(done: Callable[[None], None]) -> None:
            self.world.after(delay_ns, partial(done, None))

        yield wait

    def find(self, name: bytes, snap_id: int = 0) -> Script[VdiRecord | None]:
        result, record = yield from self.ask(
            lambda process, done: process.node.operations.find_vdi(name, b"", snap_id, done)
        )
        if result in (Result.NO_VDI, Result.NO_TAG):
            return None
        if result or record is None:
            raise Violation(f"{self.door.name}: lookup of {name!r} {snap_id}: result {result:#x}")
        found: VdiRecord = record
        return found

    def read_map(self, vid: Vid, objects: int) -> Script[list[int]]:
        result, data = yield from self.ask(
            lambda process, done: process.node.gateway.read(inode_oid(vid), map_offset(0), 4 * objects, done)
        )
        if result:
            raise Violation(f"{self.door.name}: map of {vid:x}: result {result:#x}")
        return list(unpack_map(bytes(data)))

    def read_block(self, entries: list[int], index: int, block: int) -> Script[int]:
        """The value of a block of a VDI with this map."""
        owner = Vid(entries[index])
        if not owner:
            return INITIAL
        oid = data_oid(owner, index)
        result, data = yield from self.ask(
            lambda process, done: process.node.gateway.read(oid, block * BLOCK_SIZE, BLOCK_SIZE, done)
        )
        if result:
            raise Violation(f"{self.door.name}: {oid:016x} block {block}: result {result:#x}")
        return value_of(data, f"{oid:016x} block {block}")


class VolumeOwner(Asking):
    """See the module. `values`: shared counter of values given out."""

    def __init__(self, door: Door, name: str, objects: int, blocks: tuple[int, ...], values: list[int]) -> None:
        super().__init__(door)
        self.name = name.encode()
        self.durable = True
        self.flushes = False  # writes are made durable by a flush of their own
        # Beside a Snapshotter it only reads and writes: a snapshot of what is not the working VDI any more means
        # "roll back" (protocol.md 8.3), and a discard that races with a snapshot changes the frozen map.
        self.alone = True
        self.more_acts: list[Act] = []  # what it does besides
        self.progress = Progress()
        self.images: list[Image] = []  # snapshots of this owner's own
        self.operations = 0
        self.recycling = False  # the cluster gives vids again
        self._keeps_name = False  # a snapshot may exist that is not among the images: its answer was lost
        self.policy = 0  # of the volume: 0 as many copies as the cluster's default, else the byte of a D:P
        self._objects = objects
        self._blocks = blocks
        self._values = values
        self._vid = Vid(0)
        self._map: list[int] = [0] * objects
        self._clones = 0

    @property
    def content(self) -> Content:
        return self.progress.states[-1]

    def _live(self) -> Script[None]:
        yield from self._create(self.name, Vid(0))
        acts: list[Act] = [(10, self._write), (6, self._read), *self.more_acts]
        if self.alone:
            acts += [(1, self._snapshot), (1, self._check_image), (0.6, self._drop_image), (0.4, self._clone)]
            acts += [(2, self._discard), (0.4, self._start_over), (0.4, self._roll_back)]
        while not self.stopped:
            weights = [weight for weight, _ in acts]
            yield from self.random.choices([act for _, act in acts], weights)[0]()
            self.operations += 1
            yield from self.pause(self.random.randrange(2 * MILLISECOND))

    def rest(self) -> Script[None]:
        """Long enough that what others do with the volume is not all overtaken."""
        yield from self.pause(self.random.randrange(2 * SECOND))

    # -- the working VDI -------------------------------------------------------------------------------------------

    def _create(self, name: bytes, base: Vid) -> Script[Vid]:
        size = self._objects * OBJECT_BYTES
        result, record = yield from self.ask(
            lambda process, done: process.node.operations.create_vdi(
                name, size, base, 0, self.policy, 0, SHIFT, 0, done
            ),
            (*RETRIED, *BASE_TROUBLE),
        )
        if result == Result.VDI_EXIST and self.doubtful:
            record = yield from self.find(name)  # the answer was lost, not the request
        elif result:
            raise Violation(f"{self.door.name}: creating {name!r}: result {result:#x}")
        if record is None:
            raise Violation(f"{self.door.name}: {name!r} was created and cannot be found")
        if name == self.name:
            self._vid = record.vid
        return Vid(record.vid)

    def _pick(self) -> tuple[int, int]:
        return self.random.randrange(self._objects), self.random.choice(self._blocks)

    def _change(self, content: Content) -> None:
        """The change under way has ended."""
        self.progress.states.append(content)

    def _write(self) -> Script[None]:
        index, block = self._pick()
        self._values[0] += 1
        value = self._values[0]
        self.progress.begun += 1
        yield from self._put_flushed(index, block * BLOCK_SIZE, block_of(value))
        self._change({**self.content, (index, block): value})

    def _put_flushed(self, index: int, offset: int, data: bytes) -> Script[None]:
        """With `flushes`: written, and then made durable; from the start again if a gateway died in between."""
        while True:
            yield from self._put(index, offset, data)
            if not self.flushes:
                return
            result, _ = yield partial(self.door.ask, partial(_flush, self._vid))
            if result == Result.SUCCESS:
                return
            yield from self.pause(RETRY_NS)

    def _put(self, index: int, offset: int, data: bytes) -> Script[None]:
        durable = self.durable
        while True:
            owner, vid = self._map[index], self._vid
            oid, source = data_oid(vid, index), data_oid(Vid(owner), index) if owner else ObjectId(0)
            if owner == vid:
                request = partial(_write, oid, offset, data, durable)
            else:
                request = partial(_create, oid, source, offset, data, durable)
            result, _ = yield from self.ask(request)
            if result == Result.READONLY:
                yield from self._follow()
                continue
            if result:
                raise Violation(f"{self.door.name}: writing {oid:016x}: result {result:#x}")
            if owner != vid:
                yield from self._put_entry(index, vid)
            return

    def _put_entry(self, index: int, entry: int) -> Script[None]:
        data = entry.to_bytes(4, "little")
        oid = inode_oid(self._vid)
        result, _ = yield from self.ask(
            lambda p, done: p.node.gateway.write(oid, map_offset(index), data, self.durable, done)
        )
        if result:
            raise Violation(f"{self.door.name}: map of {self._vid:x}: result {result:#x}")
        self._map[index] = entry

    def _follow(self) -> Script[None]:
        """Somebody froze the VDI: the one of that name goes on."""
        record = yield from self.find(self.name)
        if record is None or record.vid == self._vid:
            raise Violation(f"{self.door.name}: {self._vid:x} is read-only, and nothing goes on")
        self._vid = record.vid

    def _read(self) -> Script[None]:
        index, block = self._pick()
        value = yield from self.read_block(self._map, index, block)
        expected = self.content.get((index, block), INITIAL)
        if value != expected:
            where = f"{self.name!r} ({self._vid:x}), object {index}, block {block}"
            raise Violation(f"{where}: {value} instead of {expected}")

    def _discard(self) -> Script[None]:
        """Drops a whole object, as QEMU does for large discards."""
        index, _ = self._pick()
        if not self._map[index] or self._map[index] != self._vid:
            return
        self.progress.begun += 1
        while True:
            # The map of a frozen VDI must stay as it is, so ask first who goes on.
            record = yield from self.find(self.name)
            if record is not None and record.vid == self._vid:
                break
            yield from self._follow()
            if self._map[index] != self._vid:
                self._change(self.content)
                return
        yield from self._put_entry(index, 0)
        self._change({place: value for place, value in self.content.items() if place[0] != index})

    def _start_over(self) -> Script[None]:
        """Deletes the working VDI and creates a fresh one of the same name; snapshots stay."""
        if self.recycling and (self.images or self._keeps_name):
            return  # their family keeps the name
        yield from self._delete_working()
        self.progress = Progress()
        self._map = [0] * self._objects
        yield from self._create(self.name, Vid(0))

    def _roll_back(self) -> Script[None]:
        """The working VDI goes, and one branched off a snapshot takes its place."""
        if not self.images:
            return
        image = self.random.choice(self.images)
        yield from check_image(self, image, self._objects, self._blocks)
        yield from self._delete_working()
        self.progress = Progress([image.candidates[0]])
        yield from self._create(self.name, image.vid)
        self._map = yield from self.read_map(self._vid, self._objects)

    def _delete_working(self) -> Script[None]:
        name = self.name
        while (yield from self.find(name)) is not None:
            result, _ = yield from self.ask(
                lambda process, done: process.node.operations.delete_vdi(name, b"", 0, done)
            )
            if result and not (result == Result.NO_VDI and self.doubtful):
                raise Violation(f"{self.door.name}: deleting {name!r}: result {result:#x}")

    # -- snapshots and clones --------------------------------------------------------------------------------------

    def _snapshot(self) -> Script[None]:
        if len(self.images) >= 4:
            return
        image = yield from take_snapshot(self, self.name, self._objects)
        self._keeps_name |= image is None
        if image is not None:
            image.candidates = [self.content]
            self.images.append(image)

    def _check_image(self) -> Script[None]:
        if self.images:
            yield from check_image(self, self.random.choice(self.images), self._objects, self._blocks)

    def _drop_image(self) -> Script[None]:
        if not self.images:
            return
        image = self.images.pop(self.random.randrange(len(self.images)))
        result, _ = yield from self.ask(
            lambda process, done: process.node.operations.delete_vdi(image.name, b"", image.snap_id, done)
        )
        if result and not (result in (Result.NO_VDI, Result.NO_TAG) and self.doubtful):
            raise Violation(f"{self.door.name}: deleting snapshot {image.snap_id}: result {result:#x}")

    def _clone(self) -> Script[None]:
        """Makes a clone of a snapshot, reads it, and deletes it again."""
        if not self.images:
            return
        image = self.random.choice(self.images)
        self._clones += 1
        name = self.name + b"-%d" % self._clones
        vid = yield from self._create(name, image.vid)
        yield from check_image(self, Image(name, vid, 0, image.candidates), self._objects, self._blocks)
        result, _ = yield from self.ask(lambda process, done: process.node.operations.delete_vdi(name, b"", 0, done))
        if result and not (result == Result.NO_VDI and self.doubtful):
            raise Violation(f"{self.door.name}: deleting clone {name!r}: result {result:#x}")

    def check_all(self) -> Script[None]:
        record = yield from self.find(self.name)
        if record is None:
            raise Violation(f"{self.name!r} is gone")
        working = Image(self.name, record.vid, 0, [self.content])
        for image in [*self.images, working]:
            yield from check_image(self, image, self._objects, self._blocks)


def take_snapshot(who: Asking, name: bytes, objects: int) -> Script[Image | None]:
    """Freezes the working VDI of that name; None when it is not clear what was frozen."""
    record = yield from who.find(name)
    if record is None:
        return None
    result, _ = yield from who.ask(
        lambda process, done: process.node.operations.create_vdi(
            name, objects * OBJECT_BYTES, record.vid, 0, record.policy, 0, SHIFT, 1, done
        ),
        (*RETRIED, *BASE_TROUBLE),
        once=True,  # a second snapshot of what is frozen by then would mean "roll back" (protocol.md 8.3)
    )
    if who.lost:
        # Others finish what the dead gateway has begun: wait for their turn in the queue of operations.
        yield from who.ask(lambda process, done: process.node.operations.delete_vdi(b"nobody", b"", 0, done))
        return None
    if result in (Result.NO_VDI, Result.VDI_EXIST):
        return None  # deleted meanwhile
    if result:
        raise Violation(f"{who.door.name}: snapshot of {name!r}: result {result:#x}")
    return Image(name, record.vid, record.snap_id, [])


def check_image(who: Asking, image: Image, objects: int, blocks: tuple[int, ...]) -> Script[None]:
    """Reads a frozen VDI (or one that nobody writes): it must hold one of the candidates, and the same for ever."""
    entries = yield from who.read_map(image.vid, objects)
    content: Content = {}
    for index in range(objects):
        for block in blocks:
            value = yield from who.read_block(entries, index, block)
            if value != INITIAL:
                content[index, block] = value
    if content not in image.candidates:
        nearest = min(image.candidates, key=lambda one: len(set(one.items()) ^ set(content.items())))
        odd = sorted(set(nearest.items()) ^ set(content.items()))
        raise Violation(
            f"{image.name!r} ({image.vid:x}, snapshot {image.snap_id}) holds none of {len(image.candidates)} "
            f"possible contents; from the nearest it differs in {odd[:6]}"
        )
    image.candidates = [content]


class Snapshotter(Asking):
    """Takes snapshots of a volume that its owner goes on writing, and checks that each is one instant of it."""

    def __init__(self, door: Door, owner: VolumeOwner, objects: int, blocks: tuple[int, ...]) -> None:
        super().__init__(door)
        self.images: list[Image] = []
        self._owner = owner
        self._objects = objects
        self._blocks = blocks

    def _live(self) -> Script[None]:
        while not self.stopped:
            yield from self.pause(self.random.randrange(200 * MILLISECOND))
            yield from self._snapshot()

    def _snapshot(self) -> Script[None]:
        progress = self._owner.progress
        first = progress.ended
        image = yield from take_snapshot(self, self._owner.name, self._objects)
        last = progress.begun
        if image is None or self._owner.progress is not progress:
            return  # the owner started over meanwhile
        while progress.ended < last and self._owner.progress is progress and not self._owner.ended:
            yield from self.pause(5 * MILLISECOND)  # what was under way may still reach the frozen map (8.4)
        image.candidates = progress.states[first : last + 1]
        yield from check_image(self, image, self._objects, self._blocks)
        self.images.append(image)

    def check_all(self) -> Script[None]:
        for image in self.images:
            yield from check_image(self, image, self._objects, self._blocks)


def _flush(vid: Vid, process: Process, done: Answer) -> None:
    process.node.gateway.flush(vid, done)


def _write(oid: ObjectId, offset: int, data: bytes, durable: bool, process: Process, done: Answer) -> None:
    process.node.gateway.write(oid, offset, data, durable, done)


def _create(
    oid: ObjectId, source: ObjectId, offset: int, data: bytes, durable: bool, process: Process, done: Answer
) -> None:
    process.node.gateway.create(oid, source, offset, data, durable, done)
