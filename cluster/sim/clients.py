"""Simulated clients: they write and read blocks through the gateways, and remember what they saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sheepdog.cluster.core.cache import Cache
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.cluster import Machine, Process, SimCluster
from sheepdog.cluster.sim.history import INITIAL, NEVER, History, Operation, Violation
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

SHIFT = 20  # objects of 1 MiB: a world stays small
OBJECT_BYTES = 1 << SHIFT
RETRY_NS = 20 * MILLISECOND
NOT_NOW = (Result.WAIT_FOR_JOIN, Result.WAIT_FOR_FORMAT, Result.SHUTDOWN, Result.HALT, Result.CLUSTER_ERROR)
_VALUE_BYTES = 8

Answer = Callable[[int, Any], None]
LOST = -1  # result of a request whose gateway died: nobody knows what became of it


def block_of(value: int) -> bytes:
    """The bytes of a block that holds `value`."""
    return bytes(BLOCK_SIZE) if value == INITIAL else value.to_bytes(_VALUE_BYTES, "little") * (BLOCK_SIZE // 8)


def value_of(block: Buffer, where: str) -> int:
    """The value that a block holds; Violation for bytes that nobody wrote."""
    data = bytes(block)
    value = int.from_bytes(data[:_VALUE_BYTES], "little")
    if data != block_of(value):
        raise Violation(f"{where}: a torn block, begins with value {value}")
    return value


class _Call:
    """A request under way."""

    __slots__ = ("answer", "given_up", "process")

    def __init__(self, process: Process, answer: Answer) -> None:
        self.process = process
        self.answer = answer
        self.given_up = False


class Door:
    """A client's connection: one request at a time, to a gateway that may die."""

    def __init__(self, cluster: SimCluster, name: str, home: int) -> None:
        self.cluster = cluster
        self.name = name
        self.random = cluster.world.stream(f"client {name}")
        self._machine = home
        self._waiting: _Call | None = None

    @property
    def busy(self) -> bool:
        return self._waiting is not None

    def process(self) -> Process | None:
        """The sheep this client talks to; another one when its own is gone."""
        machines = self.cluster.machines
        for step in range(len(machines)):
            machine: Machine = machines[(self._machine + step) % len(machines)]
            if machine.process is not None:
                self._machine = (self._machine + step) % len(machines)
                return machine.process
        return None

    def move(self) -> None:
        """Talks to another gateway from now on."""
        self._machine = self.random.randrange(len(self.cluster.machines))

    def ask(self, request: Callable[[Process, Answer], None], answer: Answer) -> None:
        """Makes a request; `answer(result, value)`, with LOST when the gateway dies before it answers."""
        process = self.process()
        if process is None:
            answer(int(Result.WAIT_FOR_JOIN), None)
            return
        self._waiting = call = _Call(process, answer)

        def answered(result: int, value: Any = None) -> None:
            if call.given_up or not process.alive:
                return  # nobody hears it, or it never left the dead process
            if self._waiting is not call:
                raise Violation(f"{self.name}: a second answer (result {result:#x})")
            self._waiting = None
            answer(int(result), value)

        process.life.do(self, lambda: request(process, answered))

    def watch(self) -> None:
        """Notices that the gateway is gone."""
        if self._waiting is not None and not self._waiting.process.alive:
            self._lose()

    def hang_up(self) -> None:
        """The connection breaks: the answer is lost, and what was asked may be done at any time."""
        if self._waiting is not None:
            self._waiting.given_up = True
            self._lose()

    def _lose(self) -> None:
        if self._waiting is not None:
            answer, self._waiting = self._waiting.answer, None
            self._machine += 1
            answer(LOST, None)


def door_of(process: Process, oid: ObjectId, cached: bool, writing: bool) -> Gateway | Cache:
    """What takes the request, as frontends.qemu.requests does; `cached`: it has the CACHE flag."""
    cache = process.node.cache
    if cache is None:
        return process.node.gateway
    if cached:
        cache.volumes.wanted(oid, writing)
    return cache


class Volume:
    """A volume whose objects all exist, so that many clients may use it at a time."""

    def __init__(self, name: str, vid: Vid, objects: int, blocks: tuple[int, ...]) -> None:
        self.name = name
        self.vid = vid
        self.objects = objects
        self.blocks = blocks  # of every object, those that clients use


def make_thin_volume(cluster: SimCluster, name: str, objects: int, copies: int = 0, policy: int = 0) -> VdiRecord:
    """Creates a volume, all of it holes, while nothing goes wrong."""
    made: list[tuple[Result, VdiRecord | None]] = []
    cluster.machines[0].node.operations.create_vdi(
        name.encode(), objects * OBJECT_BYTES, Vid(0), copies, policy, 0, SHIFT, 0, lambda *answer: made.append(answer)
    )
    cluster.world.run_until(lambda: bool(made), 10 * SECOND, "create a volume")
    result, record = made[0]
    if result or record is None:
        raise Violation(f"volume {name}: cannot be created, result {result:#x}")
    return record


def make_volume(
    cluster: SimCluster, name: str, objects: int, blocks: tuple[int, ...], copies: int = 0, policy: int = 0
) -> Volume:
    """Creates a volume and all its objects while nothing goes wrong."""
    world = cluster.world
    gateway = cluster.machines[0].node.gateway
    record = make_thin_volume(cluster, name, objects, copies, policy)
    results: list[int] = []
    for index in range(objects):
        gateway.create(data_oid(record.vid, index), ObjectId(0), 0, b"", True, lambda r, _: results.append(r))
    world.run_until(lambda: len(results) == objects, 10 * SECOND, "create objects")
    entries = record.vid.to_bytes(4, "little") * objects
    gateway.write(inode_oid(record.vid), map_offset(0), entries, True, lambda r, _: results.append(r))
    world.run_until(lambda: len(results) == objects + 1, 10 * SECOND, "write the map")
    if any(results):
        raise Violation(f"volume {name}: results {results}")
    return Volume(name, record.vid, objects, blocks)


class BlockClient:
    """Writes and reads single or neighbouring blocks of a shared volume, one request after the other."""

    def __init__(self, door: Door, volume: Volume, history: History, values: list[int], errors: dict[int, int]) -> None:
        self._door = door
        self._volume = volume
        self._history = history
        self._values = values  # shared counter: [last value given out]
        self._errors = errors  # results other than success, counted
        self._world = door.cluster.world
        self._random = door.random
        self.stopped = False
        self.think_ns = 2 * MILLISECOND
        self.durable_chance = 0.3
        self.flush_chance = 0.02
        self.hang_up_chance = 0.0
        self.roam_chance = 0.02
        self.requests = 0
        self._asked_ns = 0
        self.longest_ns = 0  # that a request was under way

    def start(self) -> None:
        self._world.after(self._random.randrange(self.think_ns), self._next)

    @property
    def idle(self) -> bool:
        return self.stopped and not self._door.busy

    def _next(self) -> None:
        if self.stopped:
            return
        random, volume = self._random, self._volume
        if random.random() < self.roam_chance:
            self._door.move()
        self.requests += 1
        self._asked_ns = self._world.now_ns
        if random.random() < self.flush_chance:
            self._flush()
            return
        index = random.randrange(volume.objects)
        first = random.choice(volume.blocks)
        count = 2 if random.random() < 0.2 and first + 1 < OBJECT_BYTES // BLOCK_SIZE else 1
        if random.random() < 0.5:
            self._write(index, first, count)
        else:
            self.read(index, first, count, self._pause)
        if self.hang_up_chance and random.random() < self.hang_up_chance:
            self._world.after(random.randrange(5 * MILLISECOND), self._door.hang_up)

    def _flush(self) -> None:
        start_ns = self._world.now_ns

        def answered(result: int, _: Any) -> None:
            self._count(result)
            if result == Result.SUCCESS:
                self._history.flushed(self._volume.name, start_ns, self._world.now_ns)
            self._pause()

        self._door.ask(lambda process, done: process.node.gateway.flush(self._volume.vid, done), answered)

    def _pause(self) -> None:
        self.longest_ns = max(self.longest_ns, self._world.now_ns - self._asked_ns)
        self._world.after(self._random.randrange(self.think_ns), self._next)

    def _note(self, index: int, block: int, operation: Operation) -> None:
        register = (self._volume.name, index * (OBJECT_BYTES // BLOCK_SIZE) + block)
        self._history.add(register, operation)

    def _write(self, index: int, first: int, count: int) -> None:
        values = []
        for _ in range(count):
            self._values[0] += 1
            values.append(self._values[0])
        data = b"".join(block_of(value) for value in values)
        durable = self._random.random() < self.durable_chance
        oid = data_oid(self._volume.vid, index)
        start_ns = self._world.now_ns

        def answered(result: int, _: Any) -> None:
            end_ns = self._world.now_ns if result == Result.SUCCESS else NEVER
            for position, value in enumerate(values):
                self._note(index, first + position, Operation(True, value, start_ns, end_ns, self._door.name, durable))
            self._count(result)
            self._pause()

        self._door.ask(
            lambda process, done: door_of(process, oid, not durable, True).write(
                oid, first * BLOCK_SIZE, data, durable, done
            ),
            answered,
        )

    def _count(self, result: int) -> None:
        if result and result != LOST:
            self._errors[result] = self._errors.get(result, 0) + 1

    def read(self, index: int, first: int, count: int, done: Callable[[], None]) -> None:
        """Reads blocks, notes what was there, then goes on."""
        oid = data_oid(self._volume.vid, index)
        start_ns = self._world.now_ns

        def answered(result: int, data: Buffer) -> None:
            self._count(result)
            if result == Result.SUCCESS:
                if len(data) != count * BLOCK_SIZE:
                    raise Violation(f"{oid:016x}: {len(data)} bytes instead of {count} blocks")
                view, now_ns = memoryview(data), self._world.now_ns
                for position in range(count):
                    block = view[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]
                    value = value_of(block, f"{oid:016x} block {first + position}")
                    self._note(index, first + position, Operation(False, value, start_ns, now_ns, self._door.name))
            done()

        self._door.ask(
            lambda process, done: door_of(process, oid, True, False).read(
                oid, first * BLOCK_SIZE, count * BLOCK_SIZE, done
            ),
            answered,
        )
