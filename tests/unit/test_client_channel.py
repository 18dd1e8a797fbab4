"""One connection for many threads: whose answer is whose, whoever receives it, and what a break does."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.fake_sheep import FakeSheep
from tests.support.processes import wait_until
from tests.unit.test_client_roaming import Unfriendly

from sheepdog.cluster.client import channel as channel_module
from sheepdog.cluster.client import exchange as exchange_module
from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import Connection, connect, send
from sheepdog.cluster.client.requests import read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.header import HEADER_SIZE as WIRE_HEADER_SIZE
from sheepdog.cluster.wire.response import response

MIB = 1 << 20
THREADS = 12
LIMIT_S = 30.0
PLAIN_ONLY = pytest.mark.parametrize("form", ["plain"], indirect=True)  # it looks, or meddles, inside

NATIVE_ONLY = pytest.mark.parametrize("form", ["native"], indirect=True)


@pytest.fixture(autouse=True, params=["plain", "native"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bodies of the exchange."""
    monkeypatch.setattr(channel_module, "_exchange", exchange_module.Exchange)
    if request.param == "native":
        monkeypatch.delenv("SHEEPDOG_COMPILED", raising=False)
        needs.native_exchange()


def together(count: int, work: Callable[[int], None]) -> None:
    """Runs `work(0..count-1)` in threads; raises the first failure, also that of not ending."""
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a request has no end"
    if failures:
        raise failures[0]


def filled(sheep: FakeSheep) -> Vid:
    """A volume with one object whose every 1000 bytes say where they are."""
    vid = Vid(sheep.create("v", 4 * MIB))
    data = b"".join(b"%09d\n" % number * 100 for number in range(4 * MIB // 1000 + 1))
    sheep.objects[data_oid(vid, 0)] = bytearray(data[: 4 * MIB])
    return vid


def ask_for_header(channel: Channel, vid: Vid) -> tuple[int, int]:
    return channel.ask(read_header(inode_oid(vid), 0, HEADER_SIZE), b"", memoryview(bytearray(HEADER_SIZE)))


@pytest.mark.parametrize("batch", (1, 5))
def test_every_thread_gets_its_own_answer(batch: int) -> None:
    """Small ones, whole objects, writes and errors at once; with `batch` they come in reverse order."""
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        sheep.batch = batch

        def work(index: int) -> None:
            chance = random.Random(index)
            mine = 3 * MIB + index * 4096
            for turn in range(40):
                offset = chance.randrange(2 * MIB)
                length = chance.choice((1, 4096, 70_000, MIB))
                space = bytearray(length + 5)
                result, got = channel.ask(
                    read_header(data_oid(vid, 0), offset, length), b"", memoryview(space)[:length]
                )
                assert (result, got) == (Result.SUCCESS, length)
                assert space[:length] == sheep.objects[data_oid(vid, 0)][offset : offset + length]
                assert space[length:] == bytes(5)
                data = chance.randbytes(chance.choice((1, 4096)))
                assert channel.ask(write_header(data_oid(vid, 0), mine, len(data), False), data) == (0, 0)
                assert sheep.objects[data_oid(vid, 0)][mine : mine + len(data)] == data
                if turn % 8 == 0:
                    result, got = channel.ask(read_header(data_oid(vid, 77), 0, 10), b"", memoryview(bytearray(10)))
                    assert (result, got) == (Result.NO_OBJ, 0)

        def without_batches(index: int) -> None:
            try:
                work(index)
            finally:
                sheep.batch = 1  # the last ones would wait for company

        together(THREADS, without_batches)
        assert sheep.accepted == 1
        channel.close()


@PLAIN_ONLY
def test_what_is_asked_while_one_sends_leaves_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sendings: list[int] = []

    def held(sock: socket.socket, parts: list[Buffer]) -> None:
        sendings.append(len(parts))
        if len(sendings) == 1:
            wait_until(lambda: len(channel._exchange._queue) == THREADS - 1, 10, "all others have asked")
        send(sock, parts)

    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        monkeypatch.setattr(exchange_module, "send", held)

        def work(index: int) -> None:
            data = b"%d" % index if index % 2 else b""
            if data:
                assert channel.ask(write_header(data_oid(vid, 0), 100 * index, len(data), False), data) == (0, 0)
                assert sheep.objects[data_oid(vid, 0)][100 * index :].startswith(data)
            else:
                assert ask_for_header(channel, vid) == (0, HEADER_SIZE)

        together(THREADS, work)
        assert len(sendings) == 2
        channel.close()


@PLAIN_ONLY
def test_what_is_asked_while_the_connection_is_made_anew_is_sent() -> None:
    asked: list[threading.Event] = []

    def dial(address: Address) -> socket.socket:
        if asked:
            asked[0].set()
            wait_until(lambda: bool(channel._exchange._queue), 10, "somebody asks")
        return connect(address)

    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address, dial=dial)
        assert ask_for_header(channel, vid) == (0, HEADER_SIZE)  # the sheep knows of the connection that it cuts
        asked.append(threading.Event())
        sheep.cut()

        def work(index: int) -> None:
            if index:
                assert asked[0].wait(10)
            assert ask_for_header(channel, vid) == (0, HEADER_SIZE)

        together(2, work)
        channel.close()


@PLAIN_ONLY
def test_what_is_asked_while_it_closes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()
    shut = exchange_module.shut

    def held(sock: socket.socket) -> None:
        closing.set()
        wait_until(lambda: bool(channel._exchange._queue), 10, "somebody asks")
        shut(sock)

    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        monkeypatch.setattr(channel_module, "shut", held)

        def work(index: int) -> None:
            if index == 0:
                channel.close()
                return
            assert closing.wait(10)
            with pytest.raises(OSError) as caught:
                ask_for_header(channel, vid)
            assert caught.value.errno == errno.EIO

        together(2, work)


@PLAIN_ONLY
def test_threads_wake_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers come together; nobody wakes them all, since each would then wait for those before it."""
    woken: list[int] = []
    wake = exchange_module.Waiter.open

    def counted(waiter: exchange_module.Waiter) -> None:
        woken.append(threading.get_ident())
        wake(waiter)

    monkeypatch.setattr(exchange_module.Waiter, "open", counted)
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        handle = sheep._handle
        all_sent = threading.Event()

        def late(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            all_sent.wait(LIMIT_S)
            return handle(header, payload)

        monkeypatch.setattr(sheep, "_handle", late)
        sheep.batch = THREADS

        def work(index: int) -> None:
            if index == THREADS:
                flight = channel._exchange._flight
                wait_until(lambda: sum(w.waits for w in list(flight.values())) == THREADS, 10, "all have sent")
                all_sent.set()
                return
            assert ask_for_header(channel, vid) == (0, HEADER_SIZE)

        together(THREADS + 1, work)
        assert len(woken) >= THREADS - 1
        assert max(woken.count(thread) for thread in woken) <= 2
        channel.close()


@PLAIN_ONLY
def test_large_answers_are_received_where_they_belong() -> None:
    """Not by way of the channel's buffer, also when they come together with others."""
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        content = sheep.objects[data_oid(vid, 0)]
        space = bytearray(MIB)
        assert channel.ask(read_header(data_oid(vid, 0), 4096, MIB), b"", memoryview(space)) == (0, MIB)
        assert space == content[4096 : 4096 + MIB]
        assert not any(channel._exchange._buffer[WIRE_HEADER_SIZE:])
        sheep.batch = THREADS

        def work(index: int) -> None:
            space = bytearray(MIB if index % 2 else 4096)
            header = read_header(data_oid(vid, 0), index * 4096, len(space))
            assert channel.ask(header, b"", memoryview(space)) == (0, len(space))
            assert space == content[index * 4096 :][: len(space)]

        together(THREADS, work)
        channel.close()


def test_a_broken_connection_loses_no_request() -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        stop = threading.Event()

        def work(index: int) -> None:
            if index == THREADS:
                for _ in range(20):
                    time.sleep(0.02)
                    sheep.cut()
                stop.set()
                return
            turn = 0
            while not stop.is_set():
                turn += 1
                data = b"%02d%06d" % (index, turn)
                place = index * 100
                assert channel.ask(write_header(data_oid(vid, 0), place, 8, False), data) == (0, 0)
                space = memoryview(bytearray(300_000))
                assert channel.ask(read_header(data_oid(vid, 0), place, len(space)), b"", space) == (0, len(space))
                assert space[:8] == data

        together(THREADS + 1, work)
        assert sheep.accepted > 5


def test_patience_ends_for_all_and_service_returns() -> None:
    sheep = FakeSheep()
    with sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address, patience_s=0.3)
        assert ask_for_header(channel, vid) == (0, HEADER_SIZE)
    begin = time.monotonic()

    def refused(_: int) -> None:
        with pytest.raises(OSError) as caught:
            ask_for_header(channel, vid)
        assert caught.value.errno in (errno.EIO, errno.ECONNREFUSED)

    together(THREADS, refused)
    assert 0.1 < time.monotonic() - begin < 5
    begin = time.monotonic()
    together(THREADS, refused)
    assert time.monotonic() - begin < 0.5, "after patience has ended nobody waits"
    with FakeSheep() as other:
        vid = filled(other)
        channel.address = other.address
        time.sleep(1.1)
        assert ask_for_header(channel, vid) == (0, HEADER_SIZE)


def test_nonsense_breaks_the_connection() -> None:
    """More data than asked for: the stream is not trusted, the request is sent again on a new connection."""
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address, patience_s=0.5)
        answer = sheep._answer
        lies = 1

        def lying(request: object, result: int, data: bytes = b"") -> object:
            nonlocal lies
            if data and lies:
                lies -= 1
                data += b"!"
            return answer(request, result, data)  # type: ignore[arg-type]

        sheep._answer = lying  # type: ignore[method-assign, assignment]
        space = memoryview(bytearray(10))
        assert channel.ask(read_header(data_oid(vid, 0), 0, 10), b"", space) == (0, 10)
        assert sheep.accepted == 2


def test_close_ends_those_who_wait() -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        sheep.delay_s = 2.0

        def work(index: int) -> None:
            if index == 0:
                time.sleep(0.3)
                channel.close()
                return
            with pytest.raises(OSError) as caught:
                channel.ask(read_header(data_oid(vid, 0), 0, 10), b"", memoryview(bytearray(10)))
            assert caught.value.errno == errno.EIO

        together(4, work)
        with pytest.raises(OSError):
            channel.ask(read_header(data_oid(vid, 0), 0, 10), b"", memoryview(bytearray(10)))


def test_a_gateway_that_hangs_up_is_like_none() -> None:
    """Patience ends, and until then it is not asked without a pause."""
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address, 1.5)
        ask_for_header(channel, vid)
    unfriendly = Unfriendly(sheep.address)
    failed: list[OSError] = []

    def ask(index: int) -> None:
        with pytest.raises(OSError) as caught:
            ask_for_header(channel, vid)
        failed.append(caught.value)

    together(2, ask)
    unfriendly.stop()
    assert [error.errno for error in failed] == [errno.EIO] * 2
    assert 2 < unfriendly.taken < 20
    channel.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a test's size."""
    for name, seconds in (
        ("STALL_LIMIT_S", 0.3),
        ("STALL_CHECK_S", 0.1),
        ("SIGN_LIMIT_S", 0.2),
        ("SLOW_LIMIT_S", 0.5),
        ("ANSWER_LIMIT_S", 1.0),
    ):
        monkeypatch.setattr(f"sheepdog.cluster.client.channel.{name}", seconds)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("others", (0, 1))
def test_a_slow_gateway_is_not_given_the_same_work_again(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """Each time it would be longer until the next answer, and in the end none came in time."""
    for limit in ("SIGN_LIMIT_S", "SLOW_LIMIT_S", "ANSWER_LIMIT_S"):
        monkeypatch.setattr(f"sheepdog.cluster.client.channel.{limit}", 20.0)
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        handle = sheep._handle
        received: list[bytes] = []

        def slow(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            if payload:
                received.append(payload)
                time.sleep(0.8 if len(received) <= 2 else 0.0)
            return handle(header, payload)

        monkeypatch.setattr(sheep, "_handle", slow)

        def work(index: int) -> None:
            for turn in range(1 + others * index):
                payload = b"%d %d" % (index, turn)
                assert channel.ask(write_header(data_oid(vid, 0), 0, len(payload), False), payload) == (0, 0)

        together(6, work)
        assert len(received) == len(set(received))
        channel.close()


@pytest.mark.usefixtures("hurried")
def test_a_gateway_that_says_nothing_fails_requests_in_the_end() -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        sheep.delay_s = 60.0  # it holds the connection, as a stopped process does

        def refused(_: int) -> None:
            begin = time.monotonic()
            with pytest.raises(OSError, match="no answer from 127") as caught:
                ask_for_header(channel, vid)
            assert caught.value.errno == errno.EIO
            assert time.monotonic() - begin >= 1.0

        together(THREADS, refused)
        assert sheep.accepted >= 3, "it was not tried again"
        sheep.delay_s = 0.0
        assert ask_for_header(channel, vid) == (0, HEADER_SIZE)
        channel.close()


@pytest.mark.usefixtures("hurried")
def test_a_gateway_that_wakes_up_answers_all() -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        sheep.delay_s = 60.0

        def work(index: int) -> None:
            if index == 0:
                wait_until(lambda: sheep.accepted > 1, 10, "the channel connects anew")
                sheep.delay_s = 0.0
            assert ask_for_header(channel, vid) == (0, HEADER_SIZE)

        together(4, work)
        channel.close()


@pytest.mark.usefixtures("hurried")
def test_one_request_without_an_answer_among_others_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address)
        handle = sheep._handle
        swallowed = threading.Event()
        sent: list[bytes] = []
        answered = threading.Event()

        def forgetful(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            if payload:
                sent.append(payload)
            if payload == b"forgotten" and not swallowed.is_set():
                swallowed.set()
                return b"", b""
            return handle(header, payload)

        monkeypatch.setattr(sheep, "_handle", forgetful)

        def work(index: int) -> None:
            if index == 0:
                try:
                    assert channel.ask(write_header(data_oid(vid, 0), 0, 9, False), b"forgotten") == (0, 0)
                finally:
                    answered.set()
                return
            while not answered.wait(0.01):
                assert ask_for_header(channel, vid) == (0, HEADER_SIZE)

        together(3, work)
        assert swallowed.is_set() and sent == [b"forgotten"] * 2
        channel.close()


@pytest.mark.usefixtures("hurried")
def test_a_gateway_that_takes_no_more_bytes_is_a_silent_one() -> None:
    """The sender itself waits then: its kernel's buffers are full."""
    with FakeSheep() as sheep:
        vid = filled(sheep)
        channel = Channel(sheep.address, patience_s=1.0)
        sheep.delay_s = 60.0

        def refused(_: int) -> None:
            with pytest.raises(OSError) as caught:
                channel.ask(write_header(data_oid(vid, 0), 0, 4 * MIB, False), bytes(4 * MIB))
            assert caught.value.errno == errno.EIO

        together(4, refused)
        channel.close()


def test_a_connection_may_have_a_limit_for_answers() -> None:
    with FakeSheep() as sheep:
        vid = filled(sheep)
        connection = Connection(sheep.address, answer_limit_s=0.3)
        sheep.delay_s = 60.0
        header = read_header(inode_oid(vid), 0, HEADER_SIZE)

        def refused(_: int) -> None:
            with pytest.raises(OSError, match="no answer from 127") as caught:
                connection.ask(header, limit=HEADER_SIZE)
            assert caught.value.errno == errno.EIO

        together(1, refused)
        sheep.delay_s = 0.0
        assert connection.ask(header, limit=HEADER_SIZE).result == Result.SUCCESS
        connection.close()


@NATIVE_ONLY
def test_an_answer_may_come_before_all_of_its_request_is_sent() -> None:
    """Its memory is not given back while another thread sends from it."""
    queued, answered = threading.Event(), threading.Event()
    payload = bytes(16 * MIB)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                headers = [receive_exactly(connection, WIRE_HEADER_SIZE) for _ in range(2)]
                queued.set()  # the second thread is sending, and will be until this reads
                time.sleep(0.3)
                receive_exactly(connection, len(payload))
                connection.sendall(refusal(receive_exactly(connection, WIRE_HEADER_SIZE)))
                assert not answered.wait(0.3)
                receive_exactly(connection, len(payload))
                assert answered.wait(LIMIT_S)
                for header in headers:
                    connection.sendall(refusal(header))

        channel = Channel(listener.getsockname())

        def work(index: int) -> None:
            if index == 0:
                serve()
            elif index == 1:
                assert channel.ask(read_header(data_oid(Vid(1), 0), 0, 10), b"", memoryview(bytearray(10)))[0]
            elif index == 2 or queued.wait(LIMIT_S):
                time.sleep(0.1)  # the first one receives by now
                header = write_header(data_oid(Vid(1), 0), 0, len(payload), False)
                assert channel.ask(header, payload)[0] == Result.NO_OBJ
                if index == 3:
                    answered.set()

        together(4, work)
        channel.close()


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += connection.recv(min(size - len(parts), MIB))
    return bytes(parts)


def refusal(header: bytes) -> bytes:
    request = wire.REQUEST.unpack(header)
    return response(request.opcode, request.id, 1, Result.NO_OBJ)


@PLAIN_ONLY
def test_a_compiled_exchange_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(channel_module, "_NATIVE", str(tmp_path / "native"))
    monkeypatch.delenv("SHEEPDOG_COMPILED", raising=False)
    assert not channel_module.use_native(), "there is none"
    for suffix, changed in ((".py", 100), (".pxd", 100), (EXTENSION_SUFFIXES[0], 200)):
        path = tmp_path / f"native{suffix}"
        path.touch()
        os.utime(path, (changed, changed))
    assert channel_module.native_is_current()
    os.utime(tmp_path / "native.pxd", (201, 201))
    assert not channel_module.use_native()
    assert channel_module._exchange is exchange_module.Exchange


@PLAIN_ONLY
def test_the_compiled_exchange_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEEPDOG_COMPILED", "0")
    assert not channel_module.use_native()
