"""Client connections and object requests over socket pairs, against an object store in memory."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core.blocks import map_size
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Epoch, EpochRecord, ObjectId, Vid, attribute_oid, data_oid, inode_oid, vmstate_oid
from sheepdog.cluster.core.limits import INODE_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.state import ClusterState, Status
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.host.loop import new_loop
from sheepdog.cluster.host.turn import Turn
from sheepdog.cluster.wire.header import HEADER_SIZE, OBJECT_REQUEST, RESPONSE, ObjectRequest, Response
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.streams import Arena, BufferPool
from sheepdog.frontends.qemu import connection as connection_module
from sheepdog.frontends.qemu.connection import Call, Clients
from sheepdog.frontends.qemu.requests import Handler, IoDone, Requests

VID = Vid(0x1234)
DATA = data_oid(VID, 0)
MIB = 1 << 20
SIZE = 4 * MIB
EPOCH = 17


class MemoryGateway:
    """Objects in a dict. With `later` set, answers come in a turn of their own, shuffled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.objects: dict[ObjectId, bytearray] = {}
        self.durable: list[bool] = []
        self.flushed: list[Vid] = []
        self.later = False
        self.result: int | None = None  # every answer
        self.held: list[Callable[[], None]] | None = None
        self.random = random.Random(1)
        self.calls = 0

    def answer(self, done: IoDone, result: int, data: Buffer = b"") -> None:
        self.calls += 1
        if self.result is not None:
            result, data = self.result, b""
        if self.held is not None:
            self.held.append(lambda: done(result, data))
        elif self.later:
            self.loop.call_later(self.random.random() / 1000, done, result, data)
        else:
            done(result, data)

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        if oid not in self.objects:
            self.answer(done, Result.NO_OBJ)
        else:
            self.answer(done, 0, bytes(self.objects[oid][offset : offset + length]))

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        if oid not in self.objects:
            self.answer(done, Result.NO_OBJ)
            return
        self.durable.append(durable)
        assert offset + len(data) <= len(self.objects[oid])
        self.objects[oid][offset : offset + len(data)] = data
        self.answer(done, 0)

    def create(self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        if cow_oid and cow_oid not in self.objects:
            self.answer(done, Result.NO_OBJ)
            return
        self.durable.append(durable)
        content = bytearray(self.objects[cow_oid]) if cow_oid else bytearray(SIZE)
        content[offset : offset + len(data)] = data
        self.objects[oid] = content
        self.answer(done, 0)

    def zero(self, oid: ObjectId, offset: int, length: int, durable: bool, done: IoDone) -> None:
        self.write(oid, offset, bytes(length), durable, done)

    def block_map(self, oid: ObjectId, done: IoDone) -> None:
        if oid not in self.objects:
            self.answer(done, Result.NO_OBJ)
        else:
            self.answer(done, 0, bytes([0b101]).ljust(map_size(SIZE), b"\0"))

    def remove(self, oid: ObjectId, done: IoDone) -> None:
        self.answer(done, 0 if self.objects.pop(oid, None) is not None else Result.NO_OBJ)

    def flush(self, vid: Vid, done: IoDone) -> None:
        self.flushed.append(vid)
        self.answer(done, 0)

    def read_invalidated(self, oid: ObjectId, offset: int, length: int, done: IoDone, follows: bool = False) -> bool:
        return False


class Answer(NamedTuple):
    header: Response
    data: bytes


class Client:
    """The client's end of a socket pair."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.socket, server = socket.socketpair()
        self.socket.setblocking(False)
        server.setblocking(False)
        self.received = b""
        self.closed = False
        world.clients.adopt(server)

    def send(self, data: bytes, chunk: int = 1 << 30) -> None:
        """All of it, reading nothing meanwhile."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view[:chunk]) :]
            except BlockingIOError:
                self.world.turn_once()
            if chunk < 1 << 30:
                self.world.turn_once()

    def receive(self) -> None:
        try:
            while data := self.socket.recv(1 << 20):
                self.received += data
            self.closed = True
        except BlockingIOError:
            pass
        except ConnectionError:
            self.closed = True

    def gone(self) -> bool:
        """Reads what there is; True when the server has closed."""
        self.receive()
        return self.closed

    def answers(self, count: int) -> list[Answer]:
        """Exactly so many; nothing may follow them."""
        taken: list[Answer] = []

        def enough() -> bool:
            self.receive()
            at = 0
            while len(self.received) - at >= HEADER_SIZE:
                header = RESPONSE.unpack(self.received, at)
                end = at + HEADER_SIZE + header.data_length
                if len(self.received) < end:
                    break
                taken.append(Answer(header, self.received[at + HEADER_SIZE : end]))
                at = end
            self.received = self.received[at:]
            return len(taken) >= count

        self.world.until(enough)
        self.world.turn_once()
        self.receive()
        assert len(taken) == count
        assert not self.received
        return taken

    def ask(self, opcode: int, oid: int = 0, offset: int = 0, payload: bytes = b"", **fields: int) -> Answer:
        self.send(request(opcode, oid, offset, payload, **fields))
        return self.answers(1)[0]


class World:
    def __init__(self) -> None:
        self.logged: list[str] = []
        self.loop = new_loop(lambda level, text: self.logged.append(text))
        self.turn = Turn(self.loop)
        self.gateway = MemoryGateway(self.loop)
        self.cluster = ClusterState(status=Status.RUNNING, ctime=1, epochs=[EpochRecord(Epoch(EPOCH), 0, ())])
        self.cluster.vdis.put(VdiRecord(VID, b"test", shift=22, size=100 * SIZE))
        self.asked: list[int] = []
        operations: dict[int, Handler] = {Opcode.READ_VDIS: self.ask_operation, Opcode.NEW_VDI: self.ask_operation}
        requests = Requests(self.gateway, lambda: self.cluster, operations)
        self.clients = Clients(
            self.loop,
            self.turn,
            Arena(BufferPool()),
            requests.dispatch,
            lambda: self.cluster.epoch,
            lambda level, text: self.logged.append(text),
        )

    def ask_operation(self, call: Call) -> None:
        self.asked.append(call.opcode)
        call.done(0)

    def turn_once(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        async def wait() -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, self.logged
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(wait())

    def close(self) -> None:
        self.clients.close()
        self.loop.run_until_complete(asyncio.sleep(0.005))
        assert self.clients.busy_bytes == 0
        assert not self.clients.connections
        self.loop.close()


def request(opcode: int, oid: int = 0, offset: int = 0, payload: bytes = b"", **fields: int) -> bytes:
    flags = fields.pop("flags", 0)
    writes = {Opcode.WRITE_OBJ, Opcode.CREATE_AND_WRITE_OBJ, Opcode.NEW_VDI}
    header = ObjectRequest(
        version=fields.pop("version", 0x0A if opcode >= 0x80 else 1),
        opcode=opcode,
        flags=flags | (Flags.WRITE if payload or opcode in writes else 0),
        data_length=fields.pop("length", len(payload)),
        oid=oid,
        offset=offset,
    )
    return OBJECT_REQUEST.pack(header._replace(**fields)) + payload


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    try:
        yield world
    finally:
        world.close()


# Object I/O


def test_create_write_read(world: World) -> None:
    client = Client(world)
    answer = client.ask(Opcode.CREATE_AND_WRITE_OBJ, DATA, 4096, b"new!" * 1024, id=5)
    assert answer == (Response(0, Opcode.CREATE_AND_WRITE_OBJ, 0, EPOCH, 5, 0, 0), b"")
    assert client.ask(Opcode.WRITE_OBJ, DATA, 4098, b"XY").header.result == 0
    answer = client.ask(Opcode.READ_OBJ, DATA, 4094, length=8, id=0xFFFFFFFF)
    assert answer == (Response(0, Opcode.READ_OBJ, 0, EPOCH, 0xFFFFFFFF, 8, 0), b"\0\0neXYne")
    assert client.ask(Opcode.READ_OBJ, data_oid(VID, 1), length=8).header.result == Result.NO_OBJ
    assert client.ask(Opcode.WRITE_OBJ, data_oid(VID, 1), 0, b"x").header.result == Result.NO_OBJ
    whole = client.ask(Opcode.READ_OBJ, DATA, length=SIZE)
    assert whole.data == world.gateway.objects[DATA]


def test_copy_on_write_needs_the_flag(world: World) -> None:
    client = Client(world)
    parent = data_oid(Vid(9), 0)
    world.gateway.objects[parent] = bytearray(b"p" * SIZE)
    client.ask(Opcode.CREATE_AND_WRITE_OBJ, DATA, 2, b"cc", cow_oid=parent, flags=Flags.COW)
    assert world.gateway.objects[DATA][:6] == b"ppccpp"
    client.ask(Opcode.CREATE_AND_WRITE_OBJ, DATA, 2, b"cc", cow_oid=parent)
    assert world.gateway.objects[DATA][:6] == b"\0\0cc\0\0"


@pytest.mark.parametrize(
    ("flags", "durable"),
    [(0, True), (Flags.DIRECT, True), (Flags.CACHE, False), (Flags.CACHE | Flags.TGT, False), (Flags.TGT, True)],
)
def test_durable_unless_cache(world: World, flags: int, durable: bool) -> None:
    client = Client(world)
    client.ask(Opcode.CREATE_AND_WRITE_OBJ, DATA, 0, b"x", flags=flags)
    client.ask(Opcode.WRITE_OBJ, DATA, 0, b"x", flags=flags)
    assert world.gateway.durable == [durable, durable]


def test_zero_length_writes_succeed(world: World) -> None:
    client = Client(world)
    assert client.ask(Opcode.CREATE_AND_WRITE_OBJ, DATA).header.result == 0
    assert client.ask(Opcode.WRITE_OBJ, DATA, 4664).header.result == 0
    assert world.gateway.objects[DATA] == bytes(SIZE)


def test_flush_and_discard(world: World) -> None:
    client = Client(world)
    answer = client.ask(Opcode.FLUSH_VDI, inode_oid(VID), version=0)
    assert answer.header.result == 0
    assert world.gateway.flushed == [VID]
    world.gateway.objects[DATA] = bytearray(8)
    assert client.ask(Opcode.DISCARD_OBJ, DATA).header.result == 0
    assert not world.gateway.objects
    assert client.ask(Opcode.DISCARD_OBJ, inode_oid(VID)).header.result == Result.INVALID_PARMS


def test_zero_and_map(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(b"x" * SIZE)
    assert client.ask(Opcode.ZERO_OBJ, DATA, 10, length=20, flags=Flags.CACHE).header.result == 0
    assert client.ask(Opcode.ZERO_OBJ, DATA, SIZE - 5, length=5).header == Response(0, 6, 0, EPOCH, 0, 0, 0)
    assert world.gateway.objects[DATA] == b"x" * 10 + bytes(20) + b"x" * (SIZE - 35) + bytes(5)
    assert world.gateway.durable == [False, True]
    answer = client.ask(Opcode.MAP_OBJ, DATA, length=map_size(SIZE))
    assert answer.header.result == 0 and answer.data == bytes([5]).ljust(map_size(SIZE), b"\0")
    for opcode, length in ((Opcode.ZERO_OBJ, 1), (Opcode.MAP_OBJ, map_size(SIZE))):
        assert client.ask(opcode, data_oid(VID, 1), length=length).header.result == Result.NO_OBJ


def test_large_answers_do_not_wait_for_the_end_of_the_turn(world: World) -> None:
    """The client has work while the next one is read, and the bytes are sent while they are in the cache."""
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(random.Random(2).randbytes(SIZE))
    held: list[Callable[[], None]] = []
    world.gateway.held = held
    lengths = (4096, 1, connection_module.SEND_AT_ONCE_BYTES, 4096)
    for number, length in enumerate(lengths):
        client.send(request(Opcode.READ_OBJ, DATA, number, length=length, id=number))
    world.until(lambda: len(held) == len(lengths))
    sent = []
    for answer in held:
        answer()
        client.receive()
        sent.append(bool(client.received))
    assert sent == [False, False, True, True]
    for number, answered in enumerate(client.answers(len(lengths))):
        assert answered.header.id == number
        assert answered.data == world.gateway.objects[DATA][number : number + lengths[number]]


def test_the_part_beyond_a_data_object_is_dropped(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    assert client.ask(Opcode.WRITE_OBJ, DATA, SIZE - 3, b"abcdef").header.result == 0
    assert world.gateway.objects[DATA][-4:] == b"\0abc"
    assert client.ask(Opcode.WRITE_OBJ, DATA, 7 * SIZE, b"abcdef").header.result == 0
    assert world.gateway.objects[DATA][:6] == bytes(6)
    assert client.ask(Opcode.WRITE_OBJ, data_oid(VID, 9), 7 * SIZE, b"x").header.result == Result.NO_OBJ


@pytest.mark.parametrize(
    ("opcode", "oid", "offset", "fields"),
    [
        (Opcode.READ_OBJ, DATA, SIZE - 1, {"length": 2}),
        (Opcode.READ_OBJ, DATA, 0, {"length": 0xFFFFFFFF}),
        (Opcode.READ_OBJ, DATA, 0xFFFFFFFF, {"length": 0xFFFFFFFF}),
        (Opcode.READ_OBJ, DATA, 0, {"payload": b"12345678"}),
        (Opcode.READ_OBJ, inode_oid(VID), INODE_SIZE, {"length": 1}),
        (Opcode.READ_OBJ, 1 << 57, 0, {"length": 1}),  # a kind that does not exist
        (Opcode.WRITE_OBJ, inode_oid(VID), INODE_SIZE, {"payload": b"1"}),
        (Opcode.WRITE_OBJ, attribute_oid(VID, 3), 66_320, {"payload": b"1"}),
        (Opcode.CREATE_AND_WRITE_OBJ, DATA, SIZE, {"payload": b"1"}),
        (Opcode.CREATE_AND_WRITE_OBJ, vmstate_oid(VID, 1), SIZE, {"payload": b"1"}),
        (Opcode.REMOVE_OBJ, DATA, 0, {}),
        (Opcode.ZERO_OBJ, DATA, SIZE - 1, {"length": 2}),
        (Opcode.ZERO_OBJ, DATA, 0, {"payload": b"12345678"}),
        (Opcode.ZERO_OBJ, inode_oid(VID), 0, {"length": 1}),
        (Opcode.MAP_OBJ, DATA, 0, {"length": 1}),
        (Opcode.MAP_OBJ, DATA, 0, {"length": 0xFFFFFFFF}),
        (Opcode.MAP_OBJ, inode_oid(VID), 0, {"length": 128}),
        (0x7E, 0, 0, {"payload": b"12345678"}),
        (0xB6, 0, 0, {}),
        (0xA1, 0, 0, {"length": 100}),
    ],
)
def test_refused(world: World, opcode: int, oid: int, offset: int, fields: dict[str, int]) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    answer = client.ask(opcode, oid, offset, **fields)  # type: ignore[arg-type]
    assert answer.header._replace(epoch=0) == Response(opcode=opcode, result=Result.INVALID_PARMS)
    assert client.ask(Opcode.READ_OBJ, DATA, length=3).data == bytes(3)


def test_a_write_without_the_write_flag_carries_nothing(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    header = ObjectRequest(1, Opcode.WRITE_OBJ, 0, 0, 3, 100, DATA)
    client.send(OBJECT_REQUEST.pack(header))
    assert client.answers(1)[0].header.result == Result.INVALID_PARMS


@pytest.mark.parametrize(
    ("opcode", "version"), [(Opcode.WRITE_OBJ, 3), (0x99, 2), (Opcode.STAT_CLUSTER, 0x0B), (0x7E, 9)]
)
def test_wrong_version_consumes_the_payload(world: World, opcode: int, version: int) -> None:
    client = Client(world)
    answer = client.ask(opcode, DATA, payload=b"payload" * 1000, version=version)
    assert answer.header.result == Result.VER_MISMATCH
    assert client.ask(Opcode.FLUSH_VDI, inode_oid(VID)).header.result == 0


@pytest.mark.parametrize("version", [0, 1, 2])
def test_internal_codes_only_reach_dog(world: World, version: int) -> None:
    client = Client(world)
    world.gateway.result = Result.NETWORK_ERROR
    answer = client.ask(Opcode.READ_OBJ, DATA, length=100, version=version)
    assert answer.header.result == (Result.NETWORK_ERROR if version == 2 else Result.EIO)
    assert answer.header.data_length == 0


def test_a_short_read_is_an_error(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(100)
    assert client.ask(Opcode.READ_OBJ, DATA, 50, length=51).header == Response(
        opcode=Opcode.READ_OBJ, epoch=EPOCH, result=Result.EIO
    )


@pytest.mark.parametrize(
    ("status", "ctime", "other", "served"),
    [
        (Status.WAITING, 0, Result.WAIT_FOR_FORMAT, Result.SUCCESS),
        (Status.WAITING, 1, Result.WAIT_FOR_JOIN, Result.SUCCESS),
        (Status.SHUTDOWN, 1, Result.SHUTDOWN, Result.SHUTDOWN),
        (Status.KILLED, 1, Result.EIO, Result.EIO),
    ],
)
def test_states(world: World, status: Status, ctime: int, other: Result, served: Result) -> None:
    client = Client(world)
    world.cluster.status = status
    world.cluster.ctime = ctime
    assert client.ask(Opcode.NEW_VDI, payload=bytes(256)).header.result == other
    told = other if status != Status.KILLED else Result.KILLED
    assert client.ask(Opcode.READ_OBJ, DATA, length=5, version=2).header.result == told
    assert client.ask(Opcode.READ_VDIS, length=2 * MIB).header.result == served
    assert (Opcode.READ_VDIS in world.asked) == (served == 0)


def test_open_images_wait_for_missing_members(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    world.cluster.status = Status.WAITING
    requests = [
        request(Opcode.READ_OBJ, DATA, length=100, version=1, id=1),
        request(Opcode.WRITE_OBJ, DATA, 0, b"waited", version=0, id=2),
        request(Opcode.FLUSH_VDI, inode_oid(VID), version=0, id=3),
    ]
    client.send(b"".join(requests))
    assert client.ask(Opcode.NEW_VDI, payload=bytes(256), id=4).header.result == Result.WAIT_FOR_JOIN
    assert world.gateway.calls == 0
    world.cluster.status = Status.RUNNING
    assert [(answer.header.id, answer.header.result) for answer in client.answers(3)] == [(1, 0), (2, 0), (3, 0)]
    assert world.gateway.objects[DATA][:6] == b"waited"
    world.cluster.status = Status.WAITING
    client.send(requests[0])
    world.turn_once()
    world.cluster.status = Status.SHUTDOWN
    assert client.answers(1)[0].header.result == Result.SHUTDOWN


# Streams


def script(count: int) -> list[bytes]:
    numbers = random.Random(count)
    requests = []
    for index in range(count):
        if numbers.random() < 0.5:
            requests.append(
                request(Opcode.READ_OBJ, DATA, numbers.randrange(SIZE // 2), length=numbers.randrange(5000), id=index)
            )
        else:
            payload = numbers.randbytes(numbers.choice([0, 1, 512, 4096, 4096, 20_000]))
            requests.append(
                request(Opcode.WRITE_OBJ, DATA, SIZE // 2 + numbers.randrange(SIZE // 4), payload, id=index)
            )
    return requests


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 100_000), st.booleans())
def test_any_chunking(count: int, chunk: int, later: bool) -> None:
    world = World()
    try:
        client = Client(world)
        world.gateway.later = later
        world.gateway.objects[DATA] = bytearray(random.Random(7).randbytes(SIZE))
        requests = script(count)
        stream = b"".join(requests)
        client.send(stream, max(chunk, len(stream) // 2000))
        answers = {answer.header.id: answer for answer in client.answers(count)}
        before = random.Random(7).randbytes(SIZE)
        for index, sent in enumerate(requests):
            header = OBJECT_REQUEST.unpack(sent)
            answer = answers[index]
            assert answer.header.result == 0
            if header.opcode == Opcode.READ_OBJ:
                assert answer.data == before[header.offset : header.offset + header.data_length]
            else:
                assert answer.data == b""
    finally:
        world.close()


@pytest.mark.parametrize("later", [False, True])
def test_ten_thousand_pipelined_requests(world: World, later: bool) -> None:
    client = Client(world)
    world.gateway.later = later
    world.gateway.objects[DATA] = bytearray(SIZE)
    count = 10_000
    stream = b"".join(
        request(Opcode.WRITE_OBJ, DATA, 8 * n, n.to_bytes(8, "little"), id=n)
        if n % 2
        else request(Opcode.READ_OBJ, DATA, 4096, length=4096, id=n)
        for n in range(count)
    )
    sent = 0
    view = memoryview(stream)
    ids: list[int] = []
    while len(ids) < count:
        if sent < len(view):
            try:
                sent += client.socket.send(view[sent:])
            except BlockingIOError:
                world.turn_once()
        client.receive()
        at = 0
        while len(client.received) - at >= HEADER_SIZE:
            header = RESPONSE.unpack(client.received, at)
            if len(client.received) < at + HEADER_SIZE + header.data_length:
                break
            assert header.result == 0
            ids.append(header.id)
            at += HEADER_SIZE + header.data_length
        client.received = client.received[at:]
        world.turn_once()
    assert sorted(ids) == list(range(count))
    for n in range(1, count, 2):
        assert world.gateway.objects[DATA][8 * n : 8 * n + 8] == n.to_bytes(8, "little")


def test_many_idle_clients_and_half_frames(world: World) -> None:
    idle = [Client(world) for _ in range(100)]
    for number, client in enumerate(idle):
        client.send(request(Opcode.WRITE_OBJ, DATA, 0, bytes(30_000))[: 40 + 200 * number])
    for _ in range(10):
        world.turn_once()
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    assert client.ask(Opcode.READ_OBJ, DATA, length=100).header.result == 0
    for waiting in idle:
        waiting.receive()
        assert not waiting.closed
    assert world.gateway.calls == 1


@pytest.mark.parametrize(
    "header",
    [
        ObjectRequest(1, Opcode.WRITE_OBJ, Flags.WRITE, 0, 1, (1 << 31) + 4097, DATA),
        ObjectRequest(1, Opcode.NEW_VDI, Flags.WRITE, 0, 1, INODE_SIZE + 1),
        ObjectRequest(1, 0x7E, Flags.WRITE, 0, 1, 0xFFFFFFFF),
    ],
)
def test_an_impossible_length_costs_the_connection(world: World, header: ObjectRequest) -> None:
    client, other = Client(world), Client(world)
    good = request(Opcode.FLUSH_VDI, inode_oid(VID), id=8)
    client.send(good + OBJECT_REQUEST.pack(header) + bytes(1000))
    world.until(client.gone)
    assert len(world.logged) == 1
    assert "connection closed" in world.logged[0]
    assert other.ask(Opcode.FLUSH_VDI, inode_oid(VID)).header.result == 0


def test_a_vanished_client_leaves_nothing_behind(world: World) -> None:
    client = Client(world)
    world.gateway.held = []
    world.gateway.objects[DATA] = bytearray(SIZE)
    client.send(request(Opcode.READ_OBJ, DATA, length=MIB) * 10)
    world.until(lambda: world.gateway.calls == 10)
    client.socket.close()
    world.turn_once()
    for done in world.gateway.held:
        done()
    world.until(lambda: not world.clients.connections)
    assert world.clients.busy_bytes == 0


def test_a_client_that_stops_sending_still_gets_its_answers(world: World) -> None:
    client = Client(world)
    world.gateway.held = []
    world.gateway.objects[DATA] = bytearray(SIZE)
    client.send(request(Opcode.READ_OBJ, DATA, length=4096) * 3)
    client.socket.shutdown(socket.SHUT_WR)
    world.until(lambda: world.gateway.calls == 3)
    for done in world.gateway.held:
        done()
    world.until(client.gone)
    assert len(client.received) == 3 * (HEADER_SIZE + 4096)
    client.received = b""


def test_a_client_that_does_not_read_is_not_read_either(world: World) -> None:
    client = Client(world)
    world.gateway.objects[DATA] = bytearray(SIZE)
    count = 100
    stream = memoryview(request(Opcode.READ_OBJ, DATA, length=SIZE) * count)
    client.socket.send(stream)
    for _ in range(50):
        world.turn_once()
    limit = connection_module.CONNECTION_BYTES // SIZE
    assert limit <= world.gateway.calls <= limit + 2
    answers = client.answers(count)
    assert all(len(answer.data) == SIZE for answer in answers)


def test_requests_under_way_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "CONNECTION_REQUESTS", 50)
    client = Client(world)
    held: list[Callable[[], None]] = []
    world.gateway.held = held
    client.send(request(Opcode.FLUSH_VDI, inode_oid(VID)) * 200)
    for _ in range(20):
        world.turn_once()
    assert world.gateway.calls == 50
    world.gateway.held = None
    for done in held:
        done()
    client.answers(200)


def test_all_clients_together_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "TOTAL_BYTES", 10 * MIB)
    clients = [Client(world) for _ in range(20)]
    held: list[Callable[[], None]] = []
    world.gateway.held = held
    world.gateway.objects[DATA] = bytearray(SIZE)
    for client in clients:
        client.send(request(Opcode.READ_OBJ, DATA, length=MIB) * 4)
    for _ in range(20):
        world.turn_once()
    assert 10 <= world.gateway.calls <= 30  # each may have one
    world.gateway.held = None
    for done in held:
        done()
    for client in clients:
        assert all(len(answer.data) == MIB for answer in client.answers(4))


def test_a_bug_costs_one_request(world: World) -> None:
    client = Client(world)

    def broken(oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        raise RuntimeError("planted")

    world.gateway.read = broken  # type: ignore[method-assign]
    assert client.ask(Opcode.READ_OBJ, DATA, length=1).header.result == Result.SYSTEM_ERROR
    assert client.ask(Opcode.FLUSH_VDI, inode_oid(VID)).header.result == 0
    assert len(world.logged) == 1
    assert "planted" in world.logged[0]
