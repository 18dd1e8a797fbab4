"""A session without its gateway: other nodes, clusters that are starting, and patience that ends."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.cluster.client.session import RETRY_LAST_S, Session
from sheepdog.cluster.client.volume import Volume
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire.opcodes import Opcode

MIB = 1 << 20
PATIENCE_S = 1.5


def twin_of(sheep: FakeSheep, twin: FakeSheep) -> None:
    """Two nodes of one cluster."""
    twin.objects, twin.used, twin.deleted = sheep.objects, sheep.used, sheep.deleted


def test_another_node_takes_over_at_once() -> None:
    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        session = await Session.open(sheep.address, patience_s=30)
        volume = await Volume.open(session, "v")
        session.roam([sheep.address, twin.address])
        await volume.write(5, b"before")
        sheep.__exit__(None, None, None)
        start = time.monotonic()
        await volume.write(11, b" after")
        assert await volume.read(5, 12) == b"before after"
        assert time.monotonic() - start < 1
        await session.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", 4 * MIB, shift=20)
        twin_of(sheep, twin)
        asyncio.run(body(sheep, twin))
        assert twin.log


@pytest.mark.parametrize("result", [Result.WAIT_FOR_JOIN, Result.SHUTDOWN, Result.STARTUP, Result.KILLED])
def test_a_cluster_that_is_starting_is_waited_for(result: Result) -> None:
    async def body(sheep: FakeSheep) -> None:
        session = await Session.open(sheep.address, patience_s=30)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([])
        sheep.results[Opcode.READ_OBJ] = result
        reading = asyncio.create_task(volume.read(0, 10))
        await asyncio.sleep(0.5)
        assert not reading.done()
        assert sum(entry[0] == Opcode.READ_OBJ for entry in sheep.log) < 12, "asks again at a bounded rate"
        sheep.results.clear()
        assert await reading == b"x" * 10
        await session.close()

    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=20)
        asyncio.run(body(sheep))


def test_a_session_that_does_not_roam_is_told() -> None:
    async def body(sheep: FakeSheep) -> None:
        session = await Session.open(sheep.address)
        sheep.results[Opcode.GET_VDI_INFO] = Result.WAIT_FOR_JOIN
        with pytest.raises(OSError):
            await Volume.open(session, "v")
        await session.close()

    with FakeSheep() as sheep:
        asyncio.run(body(sheep))


def test_patience_ends_once_for_a_stream_of_requests() -> None:
    """A loop device sends its writes one after the other: each waiting anew would take for ever."""

    async def body(sheep: FakeSheep) -> None:
        session = await Session.open(sheep.address, PATIENCE_S)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([])
        sheep.__exit__(None, None, None)
        start = time.monotonic()
        for _ in range(200):
            with pytest.raises(OSError) as caught:
                await volume.read(0, 10)
            assert caught.value.errno == errno.EIO
        assert PATIENCE_S * 0.9 < time.monotonic() - start < PATIENCE_S + 1
        # A new listener in its place: found again by the attempt that a later request makes.
        listener = socket.create_server(sheep.address)
        await asyncio.sleep(RETRY_LAST_S + 0.1)
        reading = asyncio.create_task(volume.read(0, 10))
        accepted, _ = await asyncio.to_thread(listener.accept)
        assert await asyncio.to_thread(accepted.recv, 48)
        reading.cancel()
        await session.close()
        accepted.close()
        listener.close()

    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=20)
        asyncio.run(body(sheep))


def test_a_gateway_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.cluster.client.session.STALL_LIMIT_S", 0.5)
    monkeypatch.setattr("sheepdog.cluster.client.session.STALL_CHECK_S", 0.1)

    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        session = await Session.open(sheep.address)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([twin.address])
        await asyncio.sleep(1)  # idle is not hanging
        assert not twin.log
        sheep.delay_s = 20
        async with asyncio.timeout(5):
            assert await volume.read(0, 10) == b"x" * 10
        assert twin.log
        await session.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", 4 * MIB, shift=20)
        twin_of(sheep, twin)
        asyncio.run(body(sheep, twin))


def test_a_slow_gateway_is_not_left_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it answers others; a request that it has lost is tried elsewhere in the end."""
    for name, seconds in (("STALL_LIMIT_S", 0.5), ("STALL_CHECK_S", 0.1), ("SLOW_LIMIT_S", 2.0)):
        monkeypatch.setattr(f"sheepdog.cluster.client.session.{name}", seconds)

    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        session = await Session.open(sheep.address)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([twin.address])
        handle = sheep._handle
        lost: list[float] = []

        def forgetful(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            if payload == b"forgotten":
                lost.append(time.monotonic())
                return b"", b""
            return handle(header, payload)

        monkeypatch.setattr(sheep, "_handle", forgetful)
        writing = asyncio.create_task(volume.write(0, b"forgotten"))
        async with asyncio.timeout(10):
            while not writing.done():
                await volume.read(MIB - 10, 10)
                await asyncio.sleep(0.05)
        assert len(lost) == 1 and time.monotonic() - lost[0] >= 2.0
        await session.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", 4 * MIB, shift=20)
        twin_of(sheep, twin)
        asyncio.run(body(sheep, twin))


def test_a_request_that_nobody_answers_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("STALL_LIMIT_S", 0.3), ("STALL_CHECK_S", 0.1), ("ANSWER_LIMIT_S", 1.0)):
        monkeypatch.setattr(f"sheepdog.cluster.client.session.{name}", seconds)

    async def body(sheep: FakeSheep) -> None:
        session = await Session.open(sheep.address)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([])
        sheep.delay_s = 30
        start = time.monotonic()
        with pytest.raises(OSError) as caught:
            await volume.write(0, b"y" * MIB)
        assert caught.value.errno == errno.EIO
        assert 1.0 <= time.monotonic() - start < 3
        await session.close()

    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=20)
        asyncio.run(body(sheep))


def test_moving_takes_requests_in_flight_along() -> None:
    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        session = await Session.open(sheep.address)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        sheep.delay_s = 20
        reading = asyncio.create_task(volume.read(0, 10))
        await asyncio.sleep(0.2)
        session.move(twin.address)
        async with asyncio.timeout(5):
            assert await reading == b"x" * 10
        await session.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", 4 * MIB, shift=20)
        twin_of(sheep, twin)
        asyncio.run(body(sheep, twin))


class Unfriendly(threading.Thread):
    """Takes connections and hangs up at once, like a node that has been out of its cluster for long."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(address)
        self.taken = 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.taken += 1
            connection.close()

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(10)


@pytest.mark.parametrize("roams", [False, True])
def test_a_gateway_that_hangs_up_is_like_none(roams: bool) -> None:
    """Patience ends, and until then it is not asked without a pause."""

    async def body(sheep: FakeSheep) -> None:
        session = await Session.open(sheep.address, PATIENCE_S)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        if roams:
            session.roam([])
        sheep.__exit__(None, None, None)
        unfriendly = Unfriendly(sheep.address)
        with pytest.raises(OSError) as caught:
            await asyncio.wait_for(volume.read(0, 10), 10 * PATIENCE_S)
        unfriendly.stop()
        assert caught.value.errno == errno.EIO
        assert 2 < unfriendly.taken < 20
        await session.close()

    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=20)
        asyncio.run(body(sheep))


def test_another_one_is_asked_where_the_first_hangs_up() -> None:
    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        session = await Session.open(sheep.address, 30.0)
        volume = await Volume.open(session, "v")
        await volume.write(0, b"x" * MIB)
        session.roam([sheep.address, twin.address])
        sheep.__exit__(None, None, None)
        unfriendly = Unfriendly(sheep.address)
        assert await asyncio.wait_for(volume.read(0, 10), 10.0) == b"x" * 10
        unfriendly.stop()
        await session.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", 4 * MIB, shift=20)
        twin_of(sheep, twin)
        asyncio.run(body(sheep, twin))
