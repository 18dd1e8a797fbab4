"""The listening server: who gets which connection, many clients, no files left."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.ports import PortBlock

from sheepdog.cluster.client.address import prepare
from sheepdog.cluster.client.connection import connect
from sheepdog.cluster.client.session import dial
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import NodeId
from sheepdog.cluster.host.loop import new_loop
from sheepdog.cluster.host.same_host import connect_by_name
from sheepdog.cluster.host.server import Server
from sheepdog.cluster.wire.peer import Hello, encode_hello
from sheepdog.cluster.wire.same_host import LOOPBACK, local_name

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


class World:
    def __init__(self) -> None:
        self.logged: list[str] = []
        self.loop = new_loop(lambda level, text: self.logged.append(text))
        self.ports = PortBlock()
        self.peers: list[socket.socket] = []
        self.clients: list[socket.socket] = []
        self.server = Server(
            self.loop, self.peers.append, self.clients.append, lambda level, text: self.logged.append(text)
        )
        self.mine: list[socket.socket] = []
        self.server.admit_clients()

    def until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        async def wait() -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, self.logged
                await asyncio.sleep(0.002)

        self.loop.run_until_complete(wait())

    def connect(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection((host, port), timeout=5)
        self.mine.append(sock)
        return sock

    def dial(self, host: str = LOOPBACK) -> socket.socket:
        sock = self.loop.run_until_complete(dial(self.loop, (host, self.ports[0])))
        self.mine.append(sock)
        return sock

    def family_of_new_client(self, host: str = LOOPBACK) -> socket.AddressFamily:
        """How a client with a loop of its own reaches the server by its port, which has it then."""
        before = len(self.clients)
        sock = self.dial(host)
        sock.send(b"\x01")
        self.until(lambda: len(self.clients) == before + 1)
        return sock.family

    def close(self) -> None:
        self.server.stop_listening()
        self.loop.close()
        self.ports.close()
        for sock in (*self.peers, *self.clients, *self.mine):
            sock.close()


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    try:
        yield world
    finally:
        world.close()


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_the_first_byte_decides(world: World, address: str | None) -> None:
    world.server.listen_tcp(address, world.ports[0])
    silent = world.connect(world.ports[0])
    hello = encode_hello(Hello(NodeId(bytes(16), 7000)))
    world.connect(world.ports[0]).sendall(hello)
    world.connect(world.ports[0]).sendall(b"\x01\x02")
    world.connect(world.ports[0]).sendall(b"\x00")
    world.until(lambda: len(world.peers) == 1 and len(world.clients) == 2)
    # The byte is still there for whoever got the connection.
    assert world.peers[0].recv(100) == hello
    assert sorted(client.recv(100) for client in world.clients) == [b"\x00", b"\x01\x02"]
    for sock in (*world.peers, *world.clients):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getblocking()
    silent.sendall(b"\x02")  # a connection may take its time
    world.until(lambda: len(world.clients) == 3)


def test_clients_wait_until_they_are_let_in(world: World) -> None:
    server = Server(world.loop, world.peers.append, world.clients.append, lambda level, text: None)
    server.listen_tcp("127.0.0.1", world.ports[0])
    client = world.connect(world.ports[0])
    client.sendall(b"\x02")
    world.connect(world.ports[0]).sendall(encode_hello(Hello(NodeId(bytes(16), 7000))))
    world.until(lambda: world.peers)
    assert not world.clients
    server.admit_clients()
    assert world.clients[0].recv(10) == b"\x02"
    world.connect(world.ports[0]).sendall(b"\x01")
    world.until(lambda: len(world.clients) == 2)
    server.stop_listening()


def test_unix_socket_replaces_a_dead_one(world: World, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    world.server.listen_unix(path)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    world.mine.append(client)
    client.sendall(b"\x01")
    world.until(lambda: world.clients)
    world.server.stop_listening()
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("address", [None, LOOPBACK])
def test_clients_on_the_same_host_need_no_tcp(world: World, address: str | None) -> None:
    world.server.listen_tcp(address, world.ports[0])
    assert world.family_of_new_client() == socket.AF_UNIX
    assert world.family_of_new_client("localhost") == socket.AF_UNIX
    if address is None:
        assert world.family_of_new_client("127.0.0.2") == socket.AF_INET
    sizes = {sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for sock in (*world.clients[:2], *world.mine[:2])}
    with prepare(socket.AF_UNIX) as widest, socket.socket(socket.AF_UNIX) as plain:
        assert sizes == {widest.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)}
        assert min(sizes) > plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    world.mine.append(connect((LOOPBACK, world.ports[0])))
    assert world.mine[-1].family == socket.AF_INET, "blocking clients always use it"
    world.server.stop_listening()
    with pytest.raises(ConnectionRefusedError):
        world.dial()


def test_who_listens_elsewhere_has_no_name_here(world: World) -> None:
    world.server.listen_tcp("127.0.0.2", world.ports[0])
    with pytest.raises(ConnectionRefusedError):
        world.dial()
    assert world.family_of_new_client("127.0.0.2") == socket.AF_INET


@needs_root
def test_the_way_without_tcp_is_for_one_user(world: World) -> None:
    world.server.listen_tcp(None, world.ports[0])
    with another_user():
        stranger = world.dial()
        assert stranger.family == socket.AF_INET  # as a client
        intruder = socket.socket(socket.AF_UNIX)
        world.mine.append(intruder)
        intruder.connect(local_name(world.ports[0]))
        intruder.send(b"\x01")
    intruder.setblocking(False)
    world.until(lambda: _is_at_end(intruder))
    assert not world.clients
    stranger.send(b"\x01")
    world.until(lambda: world.clients)


@needs_root
def test_a_name_that_another_user_has_taken_is_passed_over(world: World) -> None:
    with another_user(), socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(local_name(world.ports[0]))
        squatter.listen()
        os.seteuid(0)
        world.server.listen_tcp(None, world.ports[0])
        assert [text for text in world.logged if "use TCP" in text]
        assert connect_by_name(world.ports[0]) is None, "nor do sheep take it"
        assert world.family_of_new_client() == socket.AF_INET


def _is_at_end(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_where_it_cannot_listen_it_says_so(world: World, tmp_path: Path) -> None:
    world.server.listen_tcp("127.0.0.1", world.ports[0])
    other = Server(world.loop, world.peers.append, world.clients.append, lambda level, text: None)
    with pytest.raises(UsageError, match="in use"):
        other.listen_tcp("127.0.0.1", world.ports[0])
    with pytest.raises(UsageError):
        other.listen_tcp("192.0.2.1", world.ports[1])
    with pytest.raises(UsageError):
        other.listen_unix(str(tmp_path / "missing" / "sock"))


def test_closing_before_speaking_is_harmless(world: World) -> None:
    world.server.listen_tcp("127.0.0.1", world.ports[0])
    for _ in range(20):
        world.connect(world.ports[0]).close()
    world.connect(world.ports[0]).sendall(b"\x01")
    world.until(lambda: world.clients)
    assert len(world.clients) == 1


def test_five_hundred_clients_at_once(world: World) -> None:
    world.server.listen_tcp("127.0.0.1", world.ports[0])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    for _ in range(500):
        world.connect(world.ports[0]).sendall(b"\x01")
    world.until(lambda: len(world.clients) == 500)


def test_no_files_left_is_survived(world: World) -> None:
    world.server.listen_tcp("127.0.0.1", world.ports[0])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [world.connect(world.ports[0]) for _ in range(10)]
    for sock in waiting:
        sock.sendall(b"\x01")
    spare = socket.socket()
    lowest = spare.fileno()
    spare.close()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, before[1]))
        world.until(lambda: [text for text in world.logged if "cannot accept" in text])
        assert len(world.clients) < 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    world.until(lambda: len(world.clients) == 10)
