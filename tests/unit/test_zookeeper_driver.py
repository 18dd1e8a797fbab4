"""The zookeeper driver without a server: what its argument and its log's entries mean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, View
from sheepdog.cluster.drivers import zookeeper
from sheepdog.cluster.drivers.zookeeper import ZooKeeperDriver
from sheepdog.cluster.drivers.zookeeper_argument import parse
from sheepdog.cluster.drivers.zookeeper_client import Client, Connection, SessionLost, ZnodeStat
from sheepdog.cluster.drivers.zookeeper_collect import Gaps
from sheepdog.cluster.drivers.zookeeper_log import (
    Entry,
    EntryKind,
    Roster,
    dead_entry,
    distance,
    join_entry,
    messages_entry,
    position_path,
)

A, B, C = (Peer(name, number, b"payload " + name) for name, number in ((b"a", 11), (b"b", 12), (b"c", 13)))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("h:1", ("h:1", "/sheepdog", 3000)),
        ("h:1,g:2", ("h:1,g:2", "/sheepdog", 3000)),
        ("h:1,g:2/one", ("h:1,g:2", "/one", 3000)),
        ("h:1/one/two/,timeout=5000", ("h:1", "/one/two", 5000)),
        ("h:1,g:2,timeout=100", ("h:1,g:2", "/sheepdog", 100)),
        ("h,g", ("h:2181,g:2181", "/sheepdog", 3000)),
        ("[::1]:2181,[fe80::1]", ("[::1]:2181,[fe80::1]:2181", "/sheepdog", 3000)),
    ],
)
def test_arguments(argument: str, expected: tuple[str, str, int]) -> None:
    assert parse(argument) == expected


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("", "the list of servers is missing"),
        ("/one", "the list of servers is missing"),
        (",timeout=3000", "the list of servers is missing"),
        ("h:x", "Invalid server 'h:x'"),
        ("h:0", "Invalid server 'h:0'"),
        (":2181", "Invalid server ':2181'"),
        ("h:1,timeout=99", "Invalid timeout '99'"),
        ("h:1,timeout=", "Invalid timeout ''"),
        ("h:1,timeout=3s", "Invalid timeout '3s'"),
        ("h:1/a//b", "Invalid cluster id"),
        ("h:1/../b", "Invalid cluster id"),
    ],
)
def test_wrong_arguments(argument: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"^zookeeper driver: {text}"):
        parse(argument)


def test_paths_follow_zookeepers_counter() -> None:
    assert position_path(0) == "e-0000000000"
    assert position_path(1_234_567) == "e-0001234567"
    assert position_path((1 << 31) - 1) == "e-2147483647"
    assert position_path(1 << 31) == "e--2147483648"
    assert position_path((1 << 32) + 5) == "e-0000000005"


def folded(roster: Roster, *entries: Entry) -> list[Event]:
    return [event for number, entry in enumerate(entries, 100) for event in roster.fold(number, entry)]


def test_joins_messages_and_leaves() -> None:
    roster = Roster()
    events = folded(
        roster,
        join_entry(A, 7),
        messages_entry(A.incarnation, 1, [b"1", b"2"]),
        join_entry(B, 9),
        messages_entry(C.incarnation, 1, [b"of nobody"]),
        Entry(EntryKind.LEAVE, A.incarnation, 2, b""),
        messages_entry(A.incarnation, 3, [b"too late"]),
    )
    assert events == [
        View(100 << 12, (A,), (A,), ()),
        Delivery((101 << 12) + 1, A, b"1"),
        Delivery((101 << 12) + 2, A, b"2"),
        View(102 << 12, (A, B), (B,), ()),
        View(104 << 12, (B,), (), (A,)),
    ]


def test_repeated_entries_count_once() -> None:
    roster = Roster()
    events = folded(
        roster,
        join_entry(A, 7),
        join_entry(A, 7),
        messages_entry(A.incarnation, 1, [b"1"]),
        messages_entry(A.incarnation, 1, [b"1"]),
        messages_entry(A.incarnation, 2, [b"2"]),
        messages_entry(A.incarnation, 1, [b"1"]),
    )
    assert [event.data for event in events if isinstance(event, Delivery)] == [b"1", b"2"]
    assert len([event for event in events if isinstance(event, View)]) == 1


def test_the_dead_are_waited_for_as_long_as_the_longest_lease() -> None:
    roster = Roster()
    *_, view = folded(
        roster, join_entry(A, 7), join_entry(B, 9), join_entry(C, 5), dead_entry(C.incarnation, 0, [11, 12, 99])
    )
    assert view == View(103 << 12, (C,), (), (A, B), 9)
    assert folded(roster, dead_entry(C.incarnation, 0, [11, 12])) == []


def test_a_checkpoint_goes_on_where_it_was_made() -> None:
    first = Roster()
    folded(first, join_entry(B, 7), join_entry(A, 9), messages_entry(A.incarnation, 5, [b"1"]))
    second, position = Roster.decode(first.encode(1000))
    assert position == 1000
    more = (
        messages_entry(A.incarnation, 5, [b"again"]),
        messages_entry(A.incarnation, 6, [b"2"]),
        dead_entry(A.incarnation, 0, [B.incarnation]),
    )
    assert folded(second, *more) == folded(first, *more) != []
    assert list(second.members.values()) == [A]


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x00" * 18, b"somebody else's text"])
def test_bytes_that_are_no_entry(data: bytes) -> None:
    assert Entry.decode(data) is None


@pytest.mark.parametrize("data", [b"\x02", b"\x02" + bytes(17), b"\x01\x09" + bytes(16)])
def test_entries_of_a_later_version(data: bytes) -> None:
    """Who does not understand them must not go on without them."""
    with pytest.raises(PeerError, match="this version"):
        Entry.decode(data)


def test_a_damaged_list_of_the_dead() -> None:
    with pytest.raises(PeerError, match="damaged"):
        folded(Roster(), Entry(EntryKind.DEAD, 11, 0, b"abc"))


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("e-0000000007", 5, 2),
        ("e-0000000003", 5, -2),
        (position_path(1 << 31), (1 << 31) - 1, 1),
        (position_path((1 << 32) + 5), (1 << 32) - 1, 6),
        ("f-0000000007", 5, None),
        ("e-", 5, None),
        ("e-00000x0007", 5, None),
        ("lock", 5, None),
    ],
)
def test_names_of_entries(name: str, position: int, expected: int | None) -> None:
    assert distance(name, position) == expected


@pytest.mark.parametrize("deleted", [0, 3])
@pytest.mark.parametrize("created", [3, 10, (1 << 31) - 1, (1 << 31) + 4, (1 << 32) + 6])
def test_gaps_end_where_the_counter_stands(created: int, deleted: int) -> None:
    """Also where the counter, and what ZooKeeper tells of it, begin again at their smallest number."""
    doubled = (2 * created - (created - deleted) + (1 << 31)) % (1 << 32) - (1 << 31)
    stat = ZnodeStat(1, 1, 0, 0, 0, doubled, 0, 0, 0, created - deleted, 99)

    class Queue:
        async def exists(self, path: str) -> ZnodeStat:
            return stat

        async def listing(self, path: str) -> tuple[list[str], ZnodeStat]:
            return [position_path(created - 1), position_path(created), position_path(created + 5)], stat

    async def following(position: int) -> int | None:
        return await Gaps(cast("Client", Queue()), "/base").next_after(position, 1)

    assert asyncio.run(following(created - 3)) == created - 1, "the number before it was given out for something else"
    assert asyncio.run(following(created - 1)) is None, "it is there to be read"
    assert asyncio.run(following(created)) is None, "nothing was given out beyond"
    assert asyncio.run(following(created + 1)) is None, "names of others were read in advance"


@pytest.mark.parametrize("body", [b"\0", b"\0\0\0\5abc"])
def test_messages_that_are_cut_short(body: bytes) -> None:
    roster = Roster()
    folded(roster, join_entry(A, 7))
    with pytest.raises(PeerError, match="cut short"):
        folded(roster, Entry(EntryKind.MESSAGES, A.incarnation, 1, body))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"format": 2}', b'{"format": 1, "members": [[1]], "position": 0}']
)
def test_bytes_that_are_no_checkpoint(data: bytes) -> None:
    with pytest.raises(PeerError, match="checkpoint"):
        Roster.decode(data)


def test_a_lease_that_comes_too_late_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that answer after the lease is over: the node asks for the next one while it is told of this one."""

    async def body() -> list[Event]:
        driver = ZooKeeperDriver("h:1")
        told: list[Event] = []

        async def slowly() -> None:
            await asyncio.sleep(0.01)

        def tell(event: Event) -> None:
            told.append(event)
            if isinstance(event, Leased) and len(told) < 3:
                driver.renew()

        monkeypatch.setattr(driver, "_publish", slowly)
        monkeypatch.setattr(driver, "_read_up_to", lambda transaction: slowly())
        monkeypatch.setattr(driver, "_joined", True)
        monkeypatch.setattr(driver, "_loop", asyncio.get_running_loop(), raising=False)
        monkeypatch.setattr(driver, "_up", asyncio.Event(), raising=False)
        monkeypatch.setattr(driver, "_on_event", tell, raising=False)
        driver.renew()
        await asyncio.sleep(1.0)
        await driver.close()
        return told

    assert [type(event) for event in asyncio.run(body())] == [Leased] * 3


@pytest.mark.filterwarnings("error")
def test_a_lease_asked_for_at_the_very_end_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that shall get it is cancelled before it has begun."""

    async def body() -> None:
        driver = ZooKeeperDriver("h:1")
        monkeypatch.setattr(driver, "_joined", True)
        monkeypatch.setattr(driver, "_loop", asyncio.get_running_loop(), raising=False)
        driver.renew()
        await driver.close()

    asyncio.run(body())


def test_a_server_that_is_cut_off_costs_a_part_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not refuse: kazoo would wait for as long as the session lasts, and then there is none any more."""
    waited: list[float] = []

    def silent(*_: object, timeout: float, **__: object) -> None:
        waited.append(timeout)
        raise OSError("timed out")

    monkeypatch.setattr("kazoo.handlers.utils.create_tcp_connection", silent)

    async def body() -> None:
        client = Client("192.0.2.1:1,192.0.2.2:1,192.0.2.3:1", 2.0, lambda state: None)
        client.start()
        async with asyncio.timeout(20.0):
            while len(waited) < 3:
                await asyncio.sleep(0.01)
        await client.stop()

    asyncio.run(body())
    assert sum(waited[:3]) <= 2.0 / 2


class Reached:
    """In the place of `Client`: servers that answer at once."""

    timeout_ms = 3000

    def __init__(self, servers: str, timeout_s: float, on_change: Callable[[Connection], None]) -> None:
        self.on_change = on_change

    def start(self) -> None:
        self.on_change(Connection.UP)

    async def stop(self) -> None:
        pass


@pytest.mark.parametrize("failure", [SessionLost("expired"), KeyError("somebody else's entry")])
def test_an_end_is_told_also_before_the_own_join_was_read(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """The process waits for nothing else: untold it would live on, a member of nothing."""

    async def ends() -> None:
        raise failure

    async def nothing(_: Peer) -> None:
        pass

    async def waits() -> None:
        await asyncio.sleep(60)

    async def body() -> list[Event]:
        told: list[Event] = []
        driver = ZooKeeperDriver("h:1")
        monkeypatch.setattr(zookeeper, "Client", Reached)
        monkeypatch.setattr(driver, "_join", nothing)
        monkeypatch.setattr(driver, "_read_all", ends)
        for name in ("_send_all", "_watch_all", "_collect_all"):
            monkeypatch.setattr(driver, name, waits)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await driver.open(A, told.append)
        await asyncio.sleep(0.01)
        await driver.close()
        return told

    assert [type(event) for event in asyncio.run(body())] == [Lost]


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (TypeError("len() of nothing"), "internal error: TypeError"),
        (PeerError("an entry is cut short"), "an entry is cut short"),
        (TimeoutError(), "the ensemble does not answer, or a member with the same identity is still running"),
    ],
)
def test_whatever_stops_the_attaching_is_one_kind_of_error(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, text: str
) -> None:
    """A sheep that joins again tries once more after it; another kind would be its end."""

    async def fails(_: Peer) -> None:
        raise failure

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        driver = ZooKeeperDriver("h:1")
        monkeypatch.setattr(zookeeper, "Client", Reached)
        monkeypatch.setattr(driver, "_join", fails)
        with pytest.raises(UsageError, match=f"^zookeeper driver: h:1: {text}$"):
            await driver.open(A, lambda event: None)

    asyncio.run(body())
