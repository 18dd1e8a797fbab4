"""Whatever strangers and broken clients send costs them their connection at most, never the daemon or others."""

from __future__ import annotations

import random
import resource
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from tests.process.test_native_operations import make_fs, new_vdi
from tests.support.cluster import Cluster, started
from tests.support.door import Door, plain
from tests.support.processes import resident_bytes, wait_until

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, Vid, data_oid, inode_oid
from sheepdog.cluster.wire.header import HEADER_SIZE, OBJECT_REQUEST, ObjectRequest
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.peer import Hello, encode_hello

MIB = 1 << 20
OBJECT = 4 * MIB
DANGEROUS = (Opcode.MAKE_FS, Opcode.SHUTDOWN, Opcode.KILL_NODE, Opcode.SET_LOGLEVEL)  # they do what they are asked
MEMORY_MIB = 400  # a quiet daemon takes 60; buffers of the clients of one test come on top


class Site:
    """A formatted node and a well-behaved client that must always be served."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.port = cluster.port(0)
        self.door = Door(self.port)
        assert self.door.ask(make_fs()).result == 0
        self.vid = new_vdi(self.door, b"witness")
        self.content = random.Random(1).randbytes(65_536)
        self.oid = data_oid(self.vid, 0)
        assert self.door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=self.content, oid=self.oid)).result == 0

    def open(self) -> Door:
        return Door(self.port)

    def check(self) -> None:
        """Served on the old connection and on a new one, nothing went wrong inside."""
        assert self.door.ask(plain(Opcode.READ_OBJ, len(self.content), oid=self.oid)).data == self.content
        with self.open() as fresh:
            assert fresh.ask(plain(Opcode.READ_OBJ, 10, oid=self.oid)).data == self.content[:10]
        assert "internal error" not in self.log()
        assert self.memory_mib() < MEMORY_MIB

    def log(self) -> str:
        return self.cluster.log(0).read_text(errors="replace")

    def memory_mib(self) -> int:
        (pid,) = self.cluster.pids(0)
        return resident_bytes(pid) >> 20


@pytest.fixture
def site(new_cluster: Callable[..., Cluster]) -> Iterator[Site]:
    site = Site(started(new_cluster(1)))
    yield site
    site.door.socket.close()


@pytest.mark.parametrize(
    "header",
    [
        ObjectRequest(2, Opcode.WRITE_OBJ, Flags.WRITE, data_length=0xFFFFFFFF),
        ObjectRequest(2, Opcode.NEW_VDI, Flags.WRITE, data_length=20 * MIB),
        ObjectRequest(9, 0x60, Flags.WRITE, data_length=0x80000000),
    ],
)
def test_impossible_lengths(site: Site, header: ObjectRequest) -> None:
    with site.open() as liar:
        liar.send(OBJECT_REQUEST.pack(header))
        assert liar.closed()
    assert site.log().count("connection closed") == 1
    site.check()


def test_room_for_an_answer_beyond_reason(site: Site) -> None:
    with site.open() as liar:
        for oid in (site.oid, inode_oid(site.vid), 0xFFFFFFFFFFFFFFFF):
            answer = liar.ask(plain(Opcode.READ_OBJ, 0xFFFFFFFF, oid=oid))
            assert (answer.result, answer.data) == (Result.INVALID_PARMS, b"")
        for opcode in (Opcode.GET_NODE_LIST, Opcode.GET_VDI_COPIES, Opcode.STAT_CLUSTER, Opcode.STAT):
            answer = liar.ask(plain(opcode, 0xFFFFFFFF))
            assert len(answer.data) < MIB
    site.check()


def test_random_bytes(site: Site) -> None:
    numbers = random.Random(2)
    for size in (1, 3, 47, 48, 49, 100, 1000, 5000, 100_000):
        for _ in range(4):
            data = numbers.randbytes(size)
            while data[0] == 0xF5 or int.from_bytes(data[1:2]) in DANGEROUS:
                data = numbers.randbytes(size)
            with site.open() as stranger:
                try:
                    stranger.send(data)
                except ConnectionError:
                    continue
    site.check()


def test_random_requests_with_sound_frames(site: Site) -> None:
    """Every opcode with random fields and payloads: an answer for each, whatever it is."""
    numbers = random.Random(3)
    with site.open() as fuzzer:
        for opcode in range(256):
            if opcode in DANGEROUS:
                continue
            for _ in range(4):
                payload = numbers.randbytes(numbers.choice([0, 1, 8, 24, 256, 512, 4096, 66_320]))
                fields = {
                    "oid": numbers.choice(
                        [site.oid + 1, numbers.getrandbits(64), inode_oid(Vid(numbers.getrandbits(24)))]
                    ),
                    "cow_oid": numbers.getrandbits(64),
                    "copies": numbers.getrandbits(8),
                    "copy_policy": numbers.getrandbits(8),
                    "ec_index": numbers.getrandbits(8),
                    "tgt_epoch": numbers.getrandbits(32),
                    "offset": numbers.choice([0, 4096, numbers.getrandbits(32)]),
                    "id": numbers.getrandbits(32),
                    "flags": numbers.getrandbits(16) & ~Flags.WRITE,
                    "version": numbers.choice([0, 1, 2, 0x0A, 0x0A, numbers.getrandbits(8)]),
                }
                answer = fuzzer.ask(plain(opcode, numbers.choice([0, 24, 4096]), payload, **fields))
                assert answer.id == fields["id"]
                assert answer.head[1] == opcode
                if payload and not fields["flags"] & Flags.PIGGYBACK:
                    assert answer.data == b""
    site.check()


def test_half_a_frame_and_then_silence(site: Site) -> None:
    write = plain(Opcode.WRITE_OBJ, payload=bytes(MIB), oid=site.oid)
    read = plain(Opcode.READ_OBJ, 10, oid=site.oid)
    doors = []
    for number in range(200):
        door = site.open()
        door.send((read + write)[: HEADER_SIZE + number * 40])
        assert door.answer().data == site.content[:10]
        doors.append(door)
    site.check()
    assert doors[0].silent(1.0)
    # And they may go on after any pause.
    doors[150].send((read + write)[HEADER_SIZE + 150 * 40 :])
    assert doors[150].answer().result == 0
    site.content = bytes(len(site.content))
    site.check()
    for door in doors:
        door.socket.close()
    site.check()


def test_clients_that_vanish(site: Site) -> None:
    read = plain(Opcode.READ_OBJ, OBJECT, oid=site.oid)
    write = plain(Opcode.WRITE_OBJ, payload=site.content, oid=site.oid)
    for number in range(40):
        door = site.open()
        door.send((read * 5, write * 5, read + write[: number * 100])[number % 3])
        if number % 2:
            linger = struct.pack("ii", 1, 0)  # a reset instead of an orderly end
            door.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        door.socket.close()
    site.check()


def test_a_client_that_never_reads(site: Site) -> None:
    with site.open() as deaf:
        deaf.socket.settimeout(1.0)
        request = plain(Opcode.READ_OBJ, OBJECT, oid=site.oid)
        try:
            for _ in range(20_000):
                deaf.send(request)
        except TimeoutError:
            pass  # the server does not read it any more either
        site.check()
    site.check()


def test_a_thousand_clients(site: Site) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    doors: list[Door] = []
    try:
        doors.extend(site.open() for _ in range(1000))
        read = plain(Opcode.READ_OBJ, 4096, oid=site.oid)
        for door in doors:
            door.send(read)
        for door in doors:
            assert door.answer().data == site.content[:4096]
        for door in doors[::2]:
            door.socket.close()
        assert doors[1].ask(read).result == 0
        site.check()
    finally:
        for door in doors:
            door.socket.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "data",
    [
        b"\xf5",
        b"\xf5" * 24,
        b"\xf5SHP\x01\x00" + bytes(18),
        encode_hello(Hello(NodeId(bytes(16), 1))) + bytes(1000),
        encode_hello(Hello(NodeId(b"\xff" * 16, 65_535))) + bytes(1000),
    ],
)
def test_strangers_that_say_they_are_peers(site: Site, data: bytes) -> None:
    with site.open() as stranger:
        stranger.send(data)
        if len(data) > 1:
            wait_until(stranger.closed, 15.0, "the stranger is turned away")
        site.check()
