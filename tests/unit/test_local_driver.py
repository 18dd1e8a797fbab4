"""The local driver's log, directory and driver within one process."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.limits import LEASE_NS
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, View
from sheepdog.cluster.drivers import registry
from sheepdog.cluster.drivers.local import LocalDriver
from sheepdog.cluster.drivers.local_log import DATA_START, Damaged, EventLog, RecordKind

WAIT_S = 5.0


class Attached:
    """A driver with what it delivered."""

    def __init__(self, path: Path, name: str) -> None:
        self.driver = LocalDriver(str(path))
        self.peer = Peer(name.encode(), 0, b"payload of " + name.encode())
        self.events: list[Event] = []  # those that all members have in common
        self.leases: list[Leased] = []

    async def open(self) -> Attached:
        await self.driver.open(self.peer, self._on_event)
        return self

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Leased):
            self.leases.append(event)
        else:
            self.events.append(event)

    def members(self) -> list[bytes]:
        views = [event for event in self.events if isinstance(event, View)]
        return [peer.id for peer in views[-1].members]

    def texts(self) -> list[bytes]:
        return [event.data for event in self.events if isinstance(event, Delivery)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def test_a_lease_is_given_on_request_and_after_everything_that_was_ordered_before(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        await until(lambda: len(a.leases) == 1)
        b = await Attached(tmp_path / "log", "b").open()
        b.driver.broadcast(b"before")
        await until(lambda: b"before" in b.texts())
        before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        a.driver.renew()
        await until(lambda: len(a.leases) == 2)
        assert b"before" in a.texts()
        assert before_ns <= a.leases[-1].until_ns - LEASE_NS <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for member in (a, b):
            await member.driver.close()
        a.driver.renew()  # closed: nothing happens
        await asyncio.sleep(0.02)
        assert len(a.leases) == 2

    run(body())


def test_two_members_see_the_same_events(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        assert isinstance(a.events[0], View) and a.events[0].joined == a.events[0].members
        b = await Attached(tmp_path / "log", "b").open()
        for i in range(50):
            (a, b)[i % 2].driver.broadcast(b"%d" % i)
        await until(lambda: len(a.texts()) == len(b.texts()) == 50)
        assert a.events[1:] == b.events  # b's first event is its own join, which a sees as its second
        assert a.members() == [b"a", b"b"]
        assert sorted(a.texts(), key=int) == [b"%d" % i for i in range(50)]
        assert [text for text in a.texts() if int(text) % 2] == [b"%d" % i for i in range(1, 50, 2)]  # in b's order
        await a.driver.leave()
        await until(lambda: b.members() == [b"b"])
        view = b.events[-1]
        assert isinstance(view, View) and [peer.id for peer in view.left] == [b"a"]
        await a.driver.close()
        await b.driver.leave()
        await b.driver.close()
        assert os.listdir(tmp_path / "log.d") == ["lock"]

    run(body())


def test_queued_messages_are_ordered_before_a_clean_leave(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        for i in range(9):
            b.driver.broadcast(bytes([i]) * 400_000)  # more than one batch
        await b.driver.leave()
        await until(lambda: a.members() == [b"a"])
        assert [text[0] for text in a.texts()] == list(range(9))
        assert isinstance(a.events[-1], View)
        for attached in (a, b):
            await attached.driver.close()

    run(body())


def test_a_driver_closed_without_leaving_counts_as_dead(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        await b.driver.close()
        await until(lambda: a.members() == [b"a"])
        again = await Attached(tmp_path / "log", "b").open()
        peers = [event.joined[0] for event in a.events if isinstance(event, View) and event.joined]
        incarnations = [peer.incarnation for peer in peers if peer.id == b"b"]
        await until(lambda: a.members() == [b"a", b"b"])
        view = again.events[0]
        assert isinstance(view, View) and view.joined[0].incarnation > incarnations[0]
        for attached in (a, again):
            await attached.driver.close()

    run(body())


def test_an_attached_id_cannot_attach_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        with pytest.raises(UsageError, match="same identity"):
            await Attached(tmp_path / "log", "a").open()
        assert a.members() == [b"a"]
        await a.driver.close()

    monkeypatch.setattr("sheepdog.cluster.drivers.local.OPEN_PATIENCE_S", 0.2)
    run(body())


def test_different_files_are_different_clusters(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "one", "a").open()
        b = await Attached(tmp_path / "two", "b").open()
        a.driver.broadcast(b"for one")
        await until(lambda: a.texts() == [b"for one"])
        assert (a.members(), b.members(), b.texts()) == ([b"a"], [b"b"], [])
        for attached in (a, b):
            await attached.driver.close()

    run(body())


def test_a_member_whose_files_are_removed_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        view = b.events[0]
        assert isinstance(view, View)
        os.unlink(tmp_path / "log.d" / f"{view.joined[0].incarnation}.member")
        await until(lambda: isinstance(b.events[-1], Lost))
        b.driver.broadcast(b"never")  # after Lost: without effect, without error
        await until(lambda: a.members() == [b"a"])
        os.unlink(tmp_path / "log")
        await until(lambda: isinstance(a.events[-1], Lost))
        assert a.texts() == []
        for attached in (a, b):
            await attached.driver.close()

    run(body())


def test_messages_over_the_limit_are_refused(tmp_path: Path) -> None:
    async def body() -> None:
        a = Attached(tmp_path / "log", "a")
        with pytest.raises(UsageError):
            a.driver.broadcast(b"too early")
        await a.open()
        with pytest.raises(UsageError, match="too large"):
            a.driver.broadcast(b"x" * (a.driver.max_message + 1))
        a.driver.broadcast(b"x" * a.driver.max_message)
        await until(lambda: [len(text) for text in a.texts()] == [a.driver.max_message])
        await a.driver.close()

    run(body())


def test_a_wake_up_to_a_full_socket_does_not_wait(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        view = b.events[0]
        assert isinstance(view, View)
        address = str(tmp_path / "log.d" / f"{view.joined[0].incarnation}.sock")
        flood = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with flood, pytest.raises(BlockingIOError):
            while True:
                flood.sendto(b"x", address)
        a.driver.broadcast(b"still")
        await until(lambda: b.texts() == [b"still"] and a.texts() == [b"still"])
        for attached in (a, b):
            await attached.driver.close()

    run(body())


def test_messages_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    write = EventLog._write

    def write_a_part(log: EventLog, blob: bytes, position: int) -> None:
        if full:
            write(log, blob[:-1], position)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(log, blob, position)

    async def body() -> None:
        nonlocal full
        full = False
        a = await Attached(tmp_path / "log", "a").open()
        full = True
        for i in range(3):
            a.driver.broadcast(b"%d" % i)
        await asyncio.sleep(0.3)
        assert a.texts() == []
        full = False
        a.driver.broadcast(b"3")
        await until(lambda: a.texts() == [b"0", b"1", b"2", b"3"])
        await a.driver.close()

    monkeypatch.setattr(EventLog, "_write", write_a_part)
    monkeypatch.setattr("sheepdog.cluster.drivers.local.POLL_S", 0.1)
    run(body())


def test_a_lock_held_by_a_stopped_process_does_not_keep_anybody_from_leaving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        holder = os.open(tmp_path / "log.d" / "lock", os.O_RDWR)
        fcntl.flock(holder, fcntl.LOCK_EX)
        b.driver.broadcast(b"too late")
        await b.driver.leave()
        await b.driver.close()
        assert a.members() == [b"a", b"b"]
        os.close(holder)
        await until(lambda: a.members() == [b"a"])  # its death is seen, as its lock is free
        assert a.texts() == []
        await a.driver.close()

    monkeypatch.setattr("sheepdog.cluster.drivers.local.LEAVE_PATIENCE_S", 0.2)
    run(body())


def test_the_log_gives_its_space_back(tmp_path: Path) -> None:
    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        b = await Attached(tmp_path / "log", "b").open()
        for i in range(24):
            a.driver.broadcast(b"x" * 900_000)
            await until(lambda i=i: len(a.texts()) == len(b.texts()) == i + 1)  # type: ignore[misc]
        used = os.stat(tmp_path / "log").st_blocks * 512
        assert used < 5_000_000 < 24 * 900_000 <= os.path.getsize(tmp_path / "log")
        for attached in (a, b):
            await attached.driver.leave()
            await attached.driver.close()
        c = await Attached(tmp_path / "log", "c").open()
        assert os.path.getsize(tmp_path / "log") < DATA_START + 1000
        view = c.events[0]
        assert isinstance(view, View) and view.sequence == 2 + 24 + 2 + 1  # sequences go on over generations
        await c.driver.close()

    run(body())


def test_a_file_of_another_program_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"something else")

    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        assert a.members() == [b"a"]
        await a.driver.close()

    run(body())
    assert (tmp_path / "log.old").read_bytes() == b"something else"


@pytest.mark.parametrize("damage", [b"", b"SHEEPLOG", b"\0" * 5000])
def test_a_log_without_a_valid_header_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "log").write_bytes(damage)

    async def body() -> None:
        a = await Attached(tmp_path / "log", "a").open()
        assert a.members() == [b"a"]
        await a.driver.close()

    run(body())


def test_an_unusable_path_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        run(LocalDriver(str(tmp_path / "file" / "log")).open(Peer(b"a", 0, b""), print))


def test_records_beyond_the_header_do_not_count_and_are_overwritten(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "log"))
    log.open()
    first = log.append(log.reset(None), [(RecordKind.MESSAGE, 1, b"first")])
    log.append(first, [(RecordKind.MESSAGE, 1, b"torn" * 100)])
    log.write_header(first)  # as if the writer had been killed before the header
    last = log.append(first, [(RecordKind.MESSAGE, 2, b"second")])
    records, position = log.read(DATA_START, last.end)
    assert [(r.sequence, r.data) for r in records] == [(1, b"first"), (2, b"second")]
    assert position == last.end
    log.close()


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "log"))
    log.open()
    header = log.append(log.reset(None), [(RecordKind.MESSAGE, 1, b"text")])
    with open(tmp_path / "log", "r+b") as file:
        file.seek(header.end - 1)
        file.write(b"T")
    with pytest.raises(Damaged):
        log.read(DATA_START, header.end)
    log.close()


def test_registry() -> None:
    assert "local" in registry.available()
    assert registry.parse("local") == registry.DriverSpec("local", "")
    assert registry.parse("local:/a:b") == registry.DriverSpec("local", "/a:b")
    for wrong in ("", "locall", "Local", "nothing:local"):
        with pytest.raises(UsageError, match=f"Invalid cluster driver '{wrong}'"):
            registry.parse(wrong)
    assert registry.create("local:/tmp/x").name == "local"
