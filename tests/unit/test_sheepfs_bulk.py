"""Large reads that are spliced: a file stands for /dev/fuse, a thread for the gateway."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct

import pytest

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.wire.header import HEADER_SIZE
from sheepdog.frontends.sheepfs import bulk
from sheepdog.frontends.sheepfs.bulk import BulkReads
from sheepdog.frontends.sheepfs.fuse_wire import OUT_HEADER, OUT_SIZE

ANSWER = Struct("<12xII28x")
LENGTH = 1 << 20
SECONDS = 20.0
PIECE = 100_001  # bytes that the gateway sends at a time


def content(offset: int, length: int = LENGTH) -> bytes:
    return bytes([offset >> 20]) * length


class Gateway:
    """Answers each request on each connection with what `say` gives; closes after None."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self.socket.getsockname()[:2]
        self.say: Callable[[bytes], tuple[int, bytes] | None] = lambda header: (0, content(header[0] << 20))
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # who reads may hang up
            while len(header := connection.recv(HEADER_SIZE, socket.MSG_WAITALL)) == HEADER_SIZE:
                answer = self.say(header)
                if answer is None:
                    return
                result, data = answer
                stream = ANSWER.pack(len(data), result) + data
                for begin in range(0, len(stream), PIECE):
                    connection.sendall(stream[begin : begin + PIECE])

    def close(self) -> None:
        self.socket.close()
        for connection in self.connections:
            connection.close()


def silence(until: threading.Event) -> Callable[[bytes], None]:
    """A gateway that says nothing, and then hangs up."""

    def say(header: bytes) -> None:
        until.wait(SECONDS)

    return say


class File:
    """A volume of which every read is a plain one; the header's first byte tells where."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def plain_read(self, offset: int, length: int) -> tuple[Address, bytearray] | None:
        return self.address, bytearray([offset >> 20]) + bytes(HEADER_SIZE - 1)


class Mount:
    """Reads with their ends, and what the device was given."""

    def __init__(self, gateway: Gateway, directory: Path) -> None:
        self.path = directory / "device"
        self.device = os.open(self.path, os.O_CREAT | os.O_RDWR)
        self.reads = BulkReads(self.device, asyncio.get_running_loop())
        self.file = File(gateway.address)
        self.ends: dict[int, bool] = {}

    def take(self, number: int) -> bool:
        def ended(answered: bool) -> None:
            assert number not in self.ends
            self.ends[number] = answered

        return self.reads.take(number, self.file, number << 20, LENGTH, ended)

    async def taken(self, number: int) -> None:
        """`take`, once there is a connection for it."""
        while not self.take(number):
            await asyncio.sleep(0.01)

    async def end_of(self, *numbers: int) -> list[bool]:
        while not set(numbers) <= set(self.ends):
            await asyncio.sleep(0.01)
        return [self.ends[number] for number in numbers]

    def answers(self) -> dict[int, bytes]:
        """By request."""
        data = self.path.read_bytes()
        found = {}
        while data:
            size, problem, unique = OUT_HEADER.unpack_from(data)
            assert not problem
            found[unique] = data[OUT_SIZE:size]
            data = data[size:]
        return found


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


def play(gateway: Gateway, directory: Path, scenario: Callable[[Mount], Awaitable[None]]) -> None:
    async def run() -> None:
        mount = Mount(gateway, directory)
        descriptors = len(os.listdir("/proc/self/fd"))
        async with asyncio.timeout(SECONDS):
            await scenario(mount)
        gateway.close()  # its ends are descriptors of this process too
        mount.reads.close()
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) <= descriptors, "connections and pipes are closed"
        os.close(mount.device)

    asyncio.run(run())


def test_each_reader_gets_its_bytes(gateway: Gateway, tmp_path: Path) -> None:
    async def scenario(mount: Mount) -> None:
        assert not mount.take(0), "the first one goes the usual way, while a connection is made"
        for number in range(1, 9):
            await mount.taken(number)
        assert all(await mount.end_of(*range(1, 9)))
        assert mount.answers() == {number: content(number << 20) for number in range(1, 9)}

    play(gateway, tmp_path, scenario)


@pytest.mark.parametrize(
    "answer",
    [(0x1, b""), (0, bytes(4096)), (0x1, bytes(LENGTH)), None],
    ids=["error", "short", "error with data", "hangs up"],
)
def test_what_is_no_plain_success_goes_the_usual_way(
    gateway: Gateway, tmp_path: Path, answer: tuple[int, bytes] | None
) -> None:
    async def scenario(mount: Mount) -> None:
        gateway.say = lambda header: answer if header[0] == 1 else (0, content(header[0] << 20))
        await mount.taken(1)
        assert await mount.end_of(1) == [False]
        await mount.taken(2)  # through another connection
        assert await mount.end_of(2) == [True]
        assert mount.answers() == {2: content(2 << 20)}

    play(gateway, tmp_path, scenario)


def test_a_gateway_that_hangs_up_in_the_middle(gateway: Gateway, tmp_path: Path) -> None:
    async def scenario(mount: Mount) -> None:
        await mount.taken(1)
        await mount.end_of(1)
        gateway.say = silence(threading.Event())
        await mount.taken(2)
        gateway.connections[0].sendall(ANSWER.pack(LENGTH, 0) + bytes(LENGTH // 2))
        gateway.connections[0].shutdown(socket.SHUT_RDWR)
        assert await mount.end_of(2) == [False]
        assert list(mount.answers()) == [1], "half an answer never reaches the kernel"

    play(gateway, tmp_path, scenario)


def test_a_gateway_that_hangs_is_left(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WATCH_S", 0.05)
    monkeypatch.setattr(bulk, "STALL_S", 0.2)
    silent = threading.Event()

    async def scenario(mount: Mount) -> None:
        gateway.say = silence(silent)
        await mount.taken(1)
        assert await mount.end_of(1) == [False]
        silent.set()

    play(gateway, tmp_path, scenario)


def test_connections_that_are_not_needed_are_closed(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "WATCH_S", 0.05)
    monkeypatch.setattr(bulk, "IDLE_S", 0.2)

    async def scenario(mount: Mount) -> None:
        await mount.taken(1)
        await mount.end_of(1)
        connection = gateway.connections[0]
        while connection.fileno() >= 0:  # the gateway's thread closes its end when ours is gone
            await asyncio.sleep(0.01)
        await mount.taken(2)
        assert await mount.end_of(2) == [True]

    play(gateway, tmp_path, scenario)


def test_gateways_on_other_hosts_are_not_asked_twice(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_is_local", lambda sock: False)

    async def scenario(mount: Mount) -> None:
        for number in range(20):
            assert not mount.take(number)
            await asyncio.sleep(0.01)
        assert len(gateway.connections) == 1

    play(gateway, tmp_path, scenario)


def test_a_kernel_that_takes_no_spliced_answers_is_not_asked_again(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice

    def refusing(source: int, target: int, count: int, **more: int) -> int:
        if target == mounts[0].device:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return splice(source, target, count, **more)

    mounts: list[Mount] = []

    async def scenario(mount: Mount) -> None:
        mounts.append(mount)
        monkeypatch.setattr(os, "splice", refusing)
        await mount.taken(1)
        assert await mount.end_of(1) == [False]
        for number in range(2, 10):
            assert not mount.take(number)
            await asyncio.sleep(0.01)

    play(gateway, tmp_path, scenario)


def test_a_reader_that_was_killed_needs_no_answer(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice
    mounts: list[Mount] = []

    def killed(source: int, target: int, count: int, **more: int) -> int:
        if target == mounts[0].device and not mounts[0].ends:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return splice(source, target, count, **more)

    async def scenario(mount: Mount) -> None:
        mounts.append(mount)
        monkeypatch.setattr(os, "splice", killed)
        await mount.taken(1)
        assert await mount.end_of(1) == [True]
        await mount.taken(2)
        assert await mount.end_of(2) == [True]
        assert mount.answers() == {2: content(2 << 20)}, "nothing of the first is left in a pipe"

    play(gateway, tmp_path, scenario)
