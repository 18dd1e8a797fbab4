"""What waits for a corosync daemon: with limits, on threads of their own; and which engine is taken without -c."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Peer
from sheepdog.cluster.drivers import corosync, corosync_calls, cpg, registry
from sheepdog.cluster.drivers.base import MAX_QUEUED_BYTES
from sheepdog.cluster.drivers.corosync import CorosyncDriver
from sheepdog.cluster.drivers.corosync_calls import MAX_UNANSWERED, answer, answer_now, patiently
from sheepdog.cluster.drivers.corosync_messages import HEADER_BYTES
from sheepdog.cluster.drivers.corosync_order import Order
from sheepdog.cluster.drivers.cpg import Code, CorosyncError, Process
from sheepdog.cluster.host import main

SHORT_S = 0.05
LONG_S = 20.0  # never waited for


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """A daemon that is stopped answers once this is set."""
    event = threading.Event()
    yield event
    event.set()


def refusing(*codes: int) -> Callable[[], str]:
    """A call that is refused with each of these, then answered."""
    left = deque(codes)

    def call() -> str:
        if left:
            raise CorosyncError(left.popleft())
        return "answer"

    return call


def test_a_busy_daemon_is_asked_again() -> None:
    assert patiently(refusing(Code.TRY_AGAIN, Code.TRY_AGAIN), LONG_S) == "answer"
    with pytest.raises(CorosyncError) as caught:
        patiently(refusing(*[Code.TRY_AGAIN] * 1000), SHORT_S)
    assert caught.value.code == Code.TRY_AGAIN
    with pytest.raises(CorosyncError) as caught:
        patiently(refusing(Code.TRY_AGAIN, Code.ACCESS), LONG_S)
    assert caught.value.code == Code.ACCESS


def test_a_silent_daemon_is_not_waited_for_and_its_late_answer_is_given_back(release: threading.Event) -> None:
    late: list[bool] = []
    came = threading.Event()

    def discard(result: bool) -> None:
        late.append(result)
        came.set()

    with pytest.raises(CorosyncError, match="corosync runs and does not answer"):
        answer_now(release.wait, SHORT_S, discard)
    assert late == []
    release.set()
    assert came.wait(LONG_S)
    assert late == [True]


def test_the_loop_goes_on_while_a_daemon_is_silent(release: threading.Event) -> None:
    async def body() -> list[Any]:
        late: asyncio.Queue[bool] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        turns = 0

        def discard(result: bool) -> None:
            loop.call_soon_threadsafe(late.put_nowait, result)

        asked = asyncio.create_task(answer(release.wait, SHORT_S, discard))
        while not asked.done():
            turns += 1
            await asyncio.sleep(0)
        with pytest.raises(CorosyncError):
            await asked
        release.set()
        return [turns > 10, await asyncio.wait_for(late.get(), LONG_S)]

    assert asyncio.run(body()) == [True, True]


def test_attempts_at_a_silent_daemon_do_not_pile_up(release: threading.Event) -> None:
    begun: list[int] = []

    def hang() -> None:
        begun.append(1)
        release.wait()

    for _ in range(2 * MAX_UNANSWERED):
        with pytest.raises(CorosyncError, match="does not answer"):
            answer_now(hang, 0.001)
    assert len(begun) <= MAX_UNANSWERED
    release.set()
    for future in corosync_calls._unanswered:
        future.result(LONG_S)
    assert answer_now(refusing(), LONG_S) == "answer"


# --- which engine without -c -----------------------------------------------------------------------------------------


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Lets the libraries be there, and a connection be what a call makes of it."""
    monkeypatch.setattr(cpg, "missing", lambda: None)
    monkeypatch.setattr(corosync_calls, "START_PATIENCE_S", SHORT_S)
    monkeypatch.setattr(corosync_calls, "ANSWER_S", 2 * SHORT_S)
    monkeypatch.setattr(corosync_calls, "RETRY_S", 0.001)
    registry.absent.cache_clear()

    class Group:
        def close(self) -> None: ...

    def connects(call: Callable[[], Any]) -> None:
        def connect() -> Group:
            call()
            return Group()

        connect.close = Group.close  # type: ignore[attr-defined]
        monkeypatch.setattr(cpg, "Group", connect)

    return connects


@pytest.fixture(autouse=True)
def forget_what_is_absent() -> Iterator[None]:
    yield
    registry.absent.cache_clear()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((), "corosync"),
        ((Code.TRY_AGAIN, Code.TRY_AGAIN), "corosync"),  # it has just been started
        ((Code.LIBRARY,), "local"),  # no daemon
        ((Code.ACCESS,), "local"),  # not for this user
    ],
)
def test_the_default_engine(daemon: Callable[[Any], None], codes: tuple[int, ...], expected: str) -> None:
    daemon(refusing(*codes))
    assert registry.default() == expected


def test_the_default_engine_without_the_libraries(
    daemon: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon(refusing())
    monkeypatch.setattr(cpg, "missing", lambda: "libcpg.so.4")
    registry.absent.cache_clear()
    assert registry.default() == "local"


@pytest.mark.parametrize("silent", [True, False])
def test_a_daemon_that_does_not_say_is_not_taken_for_none(
    daemon: Callable[[Any], None], silent: bool, release: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 1, before the directory is touched."""
    daemon(release.wait if silent else refusing(*[Code.TRY_AGAIN] * 1000))
    assert main.main(["-f", "/nowhere/at/all"]) == 1
    told = capsys.readouterr()
    what = "corosync runs and does not answer" if silent else "corosync is starting, or too busy to answer"
    assert told.err == f"corosync driver: {what}; with -c local it is not asked\n"
    assert main.main(["--help"]) == 0, "help is given all the same"


def test_an_address_is_asked_for_within_a_limit(daemon: Callable[[Any], None], release: threading.Event) -> None:
    daemon(release.wait)
    with pytest.raises(UsageError, match="corosync driver: corosync runs and does not answer"):
        CorosyncDriver().local_address()


# --- the driver over a daemon that makes difficulties ----------------------------------------------------------------


class Difficult:
    """A group whose daemon takes a message only now and then, or none."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals  # before each message
        self.left = refusals
        self.taken: list[bytes] = []
        self.refused = 0

    def send(self, data: bytes) -> None:
        if self.left:
            self.left -= 1
            self.refused += 1
            raise CorosyncError(Code.TRY_AGAIN)
        self.left = self.refusals
        self.taken.append(data)


def attached(monkeypatch: pytest.MonkeyPatch, group: Difficult) -> CorosyncDriver:
    """A driver as `open` leaves it, on the running loop."""
    monkeypatch.setattr(cpg, "missing", lambda: None)
    monkeypatch.setattr(corosync, "RETRY_S", 0.0)
    driver = CorosyncDriver()
    driver._loop = asyncio.get_running_loop()
    driver._on_event = lambda event: None
    driver._group = group  # type: ignore[assignment]
    me = Peer(b"a", 1, b"")
    driver._order = Order(me, Process(1, 1), corosync.LEASE_NS, driver._send, driver._emit, lambda: 0)
    return driver


def test_a_connection_that_comes_too_late_is_closed(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    closed: list[str] = []
    both = threading.Event()

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            if len(closed) == 2:
                both.set()

    def connect() -> corosync._Connected:
        release.wait()
        return corosync._Connected(Handle("group"), Handle("quorum"), 1)  # type: ignore[arg-type]

    async def soon(call: Callable[[], Any], discard: Callable[[Any], None]) -> Any:
        return await answer(call, SHORT_S, discard)

    monkeypatch.setattr(cpg, "missing", lambda: None)
    monkeypatch.setattr(corosync, "_connect", connect)
    monkeypatch.setattr(corosync, "answer", soon)
    with pytest.raises(UsageError, match="corosync runs and does not answer"):
        asyncio.run(CorosyncDriver().open(Peer(b"a", 0, b""), lambda event: None))
    assert closed == []
    release.set()
    assert both.wait(LONG_S)
    assert closed == ["group", "quorum"]


def test_a_full_queue_of_the_daemon_delays_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> Difficult:
        group = Difficult(refusals=2)
        driver = attached(monkeypatch, group)
        for number in range(200):
            driver.broadcast(b"%d" % number)
        async with asyncio.timeout(LONG_S):
            while driver._queue:
                await asyncio.sleep(0)
        assert driver._queued_bytes == 0
        driver._end()
        return group

    group = asyncio.run(body())
    assert [data[HEADER_BYTES:] for data in group.taken] == [b"%d" % number for number in range(200)]
    assert group.refused == 400


def test_messages_that_nobody_takes_are_refused_at_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> int:
        driver = attached(monkeypatch, Difficult(refusals=1 << 40))
        large = bytes(900_000)
        with pytest.raises(UsageError, match="too many messages wait"):
            for _ in range(MAX_QUEUED_BYTES // len(large) + 1):
                driver.broadcast(large)
        queued = driver._queued_bytes
        driver._end()
        return queued

    assert asyncio.run(body()) <= MAX_QUEUED_BYTES + HEADER_BYTES * 100


def test_a_verdict_waits_for_the_votes_and_the_loop_does_not(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    """Two nodes that are quorate alone: told before it is known that they are two, both would go on."""

    def votes(nodes: tuple[int, ...]) -> cpg.Votes:
        release.wait()
        return cpg.Votes(1, len(nodes), dict.fromkeys(nodes, 1), True)

    async def body() -> None:
        monkeypatch.setattr(cpg, "votes", votes)
        driver = attached(monkeypatch, Difficult(refusals=0))
        told: list[tuple[cpg.Verdict, bool]] = []
        order = driver._there
        monkeypatch.setattr(order, "on_quorum", lambda verdict: told.append((verdict, order.quorum.tie_breaker)))
        verdicts = [cpg.Verdict(True, 5, (1, 2), ()), cpg.Verdict(False, 6, (1,), (2,))]
        for verdict in verdicts:
            driver._on_quorum(verdict)
        for _ in range(100):
            await asyncio.sleep(0)
        assert told == []
        release.set()
        async with asyncio.timeout(LONG_S):
            while len(told) < 2:
                await asyncio.sleep(0)
        assert told == [(verdict, True) for verdict in verdicts]
        driver._end()

    asyncio.run(body())
