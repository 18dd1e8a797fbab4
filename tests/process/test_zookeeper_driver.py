"""The zookeeper driver against real servers: one, and ensembles of three that lose some or all of theirs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from tests.support.attached import Attached, said_to_both, until
from tests.support.members import Member, Members, agree, wait
from tests.support.pauses import Pauses
from tests.support.zookeeper import SYNC_LIMIT_TICKS, TICK_MS, Ensemble, running_servers

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Delivery, Leased, View
from sheepdog.cluster.drivers.zookeeper_argument import lease_ns
from sheepdog.cluster.drivers.zookeeper_client import Client, Unreachable, ZnodeStat

TIMEOUT_MS = 1500  # where somebody dies
ELECTION_SECONDS = 3.0  # as docs/operations.md has it
BUSY_PAUSES = 8  # processes that follow one another in it, each of which may be kept from running as this one was
LONGER_TIMEOUT_MS = 5000  # more than a busy machine needs to connect again
CALM_TIMEOUT_MS = 20_000  # where nobody shall: no pause of a busy machine is taken for a death
_numbers = count()


def new_place(servers: Ensemble, timeout_ms: int) -> str:
    """The driver's argument for a cluster that nobody else uses."""
    return f"{servers.address}/test{next(_numbers)},timeout={timeout_ms}"


@pytest.fixture(scope="module")
def server() -> Iterator[Ensemble]:
    """One server for all tests of this file; each uses a place of its own."""
    with running_servers() as started:
        yield started


@pytest.fixture
def place(server: Ensemble) -> str:
    """The driver's argument for a cluster of the test's own."""
    return new_place(server, CALM_TIMEOUT_MS)


@pytest.fixture
def members(directory: Path, server: Ensemble, teardown: ExitStack) -> Members:
    """Members that may die."""
    started = Members(directory, f"zookeeper:{new_place(server, TIMEOUT_MS)}")
    teardown.callback(started.close)
    return started


@pytest.fixture
def calm_members(directory: Path, place: str, teardown: ExitStack) -> Members:
    started = Members(directory, f"zookeeper:{place}")
    teardown.callback(started.close)
    return started


@pytest.fixture(scope="module")
def ensemble() -> Iterator[Ensemble]:
    with running_servers(3) as started:
        yield started


@pytest.fixture
def three_servers(ensemble: Ensemble) -> Iterator[Ensemble]:
    """All of them serve, whatever an earlier test has done to them."""
    ensemble.start()
    yield ensemble
    for server in ensemble.servers:
        if server.process is not None:
            server.send(signal.SIGCONT)


@pytest.fixture
def spread(directory: Path, three_servers: Ensemble, teardown: ExitStack) -> Members:
    """Members of an ensemble of three; nobody of them dies."""
    started = Members(directory, f"zookeeper:{new_place(three_servers, CALM_TIMEOUT_MS)}")
    teardown.callback(started.close)
    return started


def undisturbed(*members: Member) -> bool:
    """Whatever happened to their servers, each is attached now and always was."""
    return all(set(one.others()) <= {"Suspended", "Resumed"} and one.others()[-1:] != ["Suspended"] for one in members)


def test_one_order_for_all(calm_members: Members) -> None:
    members = calm_members
    a, b, c = members.together("a", "b", "c")
    for member in (a, b):
        member.tell("spread x 100")
    c.tell("send y 300")
    wait(lambda: all(len(member.messages()) == 500 for member in (a, b, c)), members)
    assert agree((a, b, c))
    for member in (a, b, c):
        own = [text for text in member.messages() if text.startswith(member.name)]
        word = "y" if member is c else "x"
        assert own == [f"{member.name} {word} {index}" for index in range(len(own))]
    wait(lambda: undisturbed(a, b, c), members)
    assert a.members() == b.members() == c.members() == ["a", "b", "c"]


def test_deaths_and_leaves(members: Members) -> None:
    a, b, c, d = members.together("a", "b", "c", "d")
    c.signal(signal.SIGKILL)
    wait(lambda: all(member.members() == ["a", "b", "d"] for member in (a, b, d)), members)
    assert a.views()[-1][4] == pytest.approx(0.55), "the others wait for the lease of one that may only be slow"
    a.signal(signal.SIGKILL)  # the one that declares deaths
    wait(lambda: b.members() == d.members() == ["b", "d"], members)


def test_a_death_while_the_leader_is_silent(directory: Path, three_servers: Ensemble, teardown: ExitStack) -> None:
    """The bound that docs/operations.md states: the servers have to notice, to elect, and count the session anew."""
    members = Members(directory, f"zookeeper:{new_place(three_servers, TIMEOUT_MS)}")
    teardown.callback(members.close)
    a, b, c = members.together("a", "b", "c")
    pauses = teardown.enter_context(Pauses())
    three_servers.leader().send(signal.SIGSTOP)
    c.signal(signal.SIGKILL)
    took = wait(lambda: a.members() == b.members() == ["a", "b"], members, 60.0)
    stated = (SYNC_LIMIT_TICKS * TICK_MS + TIMEOUT_MS + TICK_MS) / 1000 + ELECTION_SECONDS
    print(f"took {took:.2f} s, stated are {stated:.2f} s, the longest pause was {pauses.longest:.2f} s")
    assert TIMEOUT_MS / 1000 < took < stated + BUSY_PAUSES * pauses.longest


def test_a_leave_is_no_death(calm_members: Members) -> None:
    a, b = calm_members.together("a", "b")
    b.tell("send last 3")
    b.tell("leave")
    assert wait(lambda: a.members() == ["a"], calm_members) < CALM_TIMEOUT_MS / 1000, "before its session could end"
    assert a.views()[-1][4] == 0, "nobody waits for a lease"
    assert a.messages() == [f"b last {index}" for index in range(3)]


def test_a_quick_restart_waits_for_the_old_session(members: Members) -> None:
    a, b = members.together("a", "b")
    b.signal(signal.SIGKILL)
    again = members.start("b")
    wait(lambda: a.members() == again.members() == ["a", "b"] and len(a.views()) == 4, members)
    assert [peer[0] for peer in a.views()[-2][3]] == ["b"], "it left before it came again"
    assert again.views()[0][2][0][1] > b.views()[0][2][0][1], "a new incarnation"


def test_everybody_dies_and_starts_again(members: Members) -> None:
    first = members.together("a", "b", "c")
    first[0].tell("send old 10")
    wait(lambda: len(first[2].messages()) == 10, members)
    for member in first:
        member.signal(signal.SIGKILL)
    again = [members.start(name) for name in ("c", "a", "b")]
    wait(lambda: all(sorted(member.members()) == ["a", "b", "c"] for member in again), members)
    again[0].tell("send new 10")
    wait(lambda: all(len(member.messages()) >= 10 for member in again), members)
    assert agree(again)
    assert not [text for member in again for text in member.messages() if "old" in text]


def test_a_stopped_process_is_out(members: Members) -> None:
    a, b = members.together("a", "b")
    wait(lambda: len(b.leases()) == 1, members)
    b.tell("renew")
    wait(lambda: len(b.leases()) == 2, members)
    b.signal(signal.SIGSTOP)
    wait(lambda: a.members() == ["a"], members)
    b.signal(signal.SIGCONT)
    wait(lambda: b.others()[-1:] == ["Lost"], members)
    assert b.members() == ["a", "b"], "it hears of nothing after the end of its session"


def test_clusters_in_one_ensemble_do_not_meet(server: Ensemble, directory: Path, teardown: ExitStack) -> None:
    start = f"zookeeper:{server.address}"
    groups = [Members(directory, f"{start}/{name},timeout={CALM_TIMEOUT_MS}") for name in ("one", "two")]
    for group in groups:
        teardown.callback(group.close)
    (a,) = groups[0].together("a")
    (b,) = groups[1].together("b")
    a.tell("send x 3")
    b.tell("send y 3")
    wait(lambda: len(a.messages()) == len(b.messages()) == 3, groups[0])
    assert (a.members(), b.members()) == (["a"], ["b"])


def test_the_leader_dies(spread: Members, three_servers: Ensemble) -> None:
    """Nobody is declared dead, and nothing is lost or comes twice."""
    a, b, c = spread.together("a", "b", "c")
    a.tell("spread x 300")
    time.sleep(0.2)
    three_servers.leader().stop()
    wait(lambda: all(len(member.messages()) == 300 for member in (a, b, c)), spread)
    assert agree((a, b, c))
    assert a.messages() == [f"a x {index}" for index in range(300)]
    wait(lambda: undisturbed(a, b, c), spread)
    assert a.members() == ["a", "b", "c"]


def test_all_servers_go_and_come_back(directory: Path, three_servers: Ensemble, teardown: ExitStack) -> None:
    """For longer than a session lasts: nobody can end it, and the servers count anew when they are back."""
    members = Members(directory, f"zookeeper:{new_place(three_servers, LONGER_TIMEOUT_MS)}")
    teardown.callback(members.close)
    a, b, c = members.together("a", "b", "c")
    for server in three_servers.servers:
        server.stop()
    wait(lambda: all(member.others()[-1:] == ["Suspended"] for member in (a, b, c)), members)
    a.tell("send while 5")
    b.tell("send while 5")
    time.sleep(1.5 * LONGER_TIMEOUT_MS / 1000)
    assert [member.others()[-1] for member in (a, b, c)] == ["Suspended"] * 3
    assert a.messages() == []
    for server in three_servers.servers:
        server.start()
    wait(lambda: undisturbed(a, b, c), members, 120.0)
    wait(lambda: all(len(member.messages()) == 10 for member in (a, b, c)), members)
    assert agree((a, b, c))
    assert a.members() == ["a", "b", "c"]


def test_a_rolling_restart_of_the_servers(spread: Members, three_servers: Ensemble) -> None:
    a, b, c = spread.together("a", "b", "c")
    for number, server in enumerate(three_servers.servers):
        server.stop(signal.SIGTERM)
        a.tell(f"send round{number} 20")
        wait(lambda number=number: len(c.messages()) == 20 * (number + 1), spread)  # type: ignore[misc]
        server.start()
        server.wait_ready()
    wait(lambda: undisturbed(a, b, c), spread)
    assert a.members() == b.members() == c.members() == ["a", "b", "c"]
    assert agree((a, b, c))


def test_without_a_majority_of_servers_nobody_gets_a_lease(spread: Members, three_servers: Ensemble) -> None:
    a, b = spread.together("a", "b")
    leader = three_servers.leader()
    for server in three_servers.servers:
        if server is not leader:
            server.send(signal.SIGSTOP)
    a.tell("renew")
    b.tell("renew")
    time.sleep(0.2)
    before = len(a.leases()), len(b.leases())
    wait(lambda: "Suspended" in a.others() and "Suspended" in b.others(), spread)
    assert (len(a.leases()), len(b.leases())) == before
    for server in three_servers.servers:
        server.send(signal.SIGCONT)
    wait(lambda: a.others()[-1:] == b.others()[-1:] == ["Resumed"] and undisturbed(a, b), spread)


def test_the_log_is_kept_short(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.CHECKPOINT_ENTRIES", 20)
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.PUBLISH_ENTRIES", 5)

    async def body() -> None:
        a = await Attached(place, "a").open()
        b = await Attached(place, "b").open()
        client = a.driver._there
        base = a.driver._base
        for index in range(100):
            await said_to_both(a, b, index)
        assert sorted(a.texts(), key=int) == [b"%d" % index for index in range(100)] == sorted(b.texts(), key=int)

        async def length() -> int:
            return len(await client.children(f"{base}/queue"))

        async with asyncio.timeout(20):
            while await length() > 40:
                await asyncio.sleep(0.1)
        c = await Attached(place, "c").open()  # begins at the checkpoint
        assert c.members() == [b"a", b"b", b"c"]
        b.driver.broadcast(b"new")
        await until(lambda: c.texts() == [b"new"])
        for one in (a, b, c):
            await one.driver.leave()
            await one.driver.close()

    asyncio.run(body())


def test_a_create_whose_answer_was_lost(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry is there twice, its messages come once."""
    create = Client.create
    lose = False

    async def create_and_lose(self: Client, path: str, data: bytes, **options: bool) -> None:
        nonlocal lose
        await create(self, path, data, **options)
        if lose and path.endswith("/queue/e-"):
            lose = False
            raise Unreachable("the answer was lost")

    monkeypatch.setattr(Client, "create", create_and_lose)

    async def body() -> None:
        nonlocal lose
        lose = True
        a = await Attached(place, "a").open()  # its join
        assert not lose
        lose = True
        a.driver.broadcast(b"1")
        await until(lambda: a.texts() == [b"1"])
        a.driver.broadcast(b"2")
        await until(lambda: a.texts() == [b"1", b"2"])
        assert not lose
        names = await a.driver._there.children(f"{a.driver._base}/queue")
        assert len(names) == 3 + 2, "both entries are there twice"
        assert len([event for event in a.events if isinstance(event, View)]) == 1
        await a.driver.leave()
        await a.driver.close()

    asyncio.run(body())


def test_who_joins_while_the_dead_are_looked_for_is_not_one_of_them(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the oldest member comes to read the list of those that are there."""
    children = Client.children

    async def body() -> None:
        held, released = asyncio.Event(), asyncio.Event()

        async def late(self: Client, path: str, watch: Callable[[], None] | None = None) -> list[str]:
            names = await children(self, path, watch)
            if path.endswith("/members") and watch is not None:
                held.set()
                await released.wait()
            return names

        monkeypatch.setattr(Client, "children", late)
        a = await Attached(place, "a").open()
        await held.wait()
        b = await Attached(place, "b").open()
        await until(lambda: a.members() == b.members() == [b"a", b"b"])
        released.set()
        for one in (a, b):
            one.driver.broadcast(one.driver._me.id)
        await until(lambda: set(a.texts()) == set(b.texts()) == {b"a", b"b"})
        assert a.members() == b.members() == [b"a", b"b"]
        for one in (b, a):
            await one.driver.leave()
            await one.driver.close()

    asyncio.run(body())


def test_an_id_that_is_attached_cannot_attach_twice(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.JOIN_PATIENCE_S", 0.5)

    async def body() -> None:
        a = await Attached(place, "a").open()
        with pytest.raises(UsageError, match="same identity"):
            await Attached(place.replace(f"timeout={CALM_TIMEOUT_MS}", f"timeout={TIMEOUT_MS}"), "a").open()
        assert a.members() == [b"a"]
        await a.driver.close()

    asyncio.run(body())


def test_the_largest_message_and_many_at_once(place: str) -> None:
    async def body() -> None:
        a = await Attached(place, "a").open()
        with pytest.raises(UsageError, match="too large"):
            a.driver.broadcast(b"x" * (a.driver.max_message + 1))
        a.driver.broadcast(b"x" * a.driver.max_message)
        for index in range(10_000):
            a.driver.broadcast(b"%d" % index)
        await until(lambda: len(a.texts()) == 10_001)
        assert a.texts()[1:] == [b"%d" % index for index in range(10_000)]
        sequences = [event.sequence for event in a.events if isinstance(event, Delivery)]
        assert sequences == sorted(set(sequences))
        await a.driver.leave()
        await a.driver.close()

    asyncio.run(body())


@pytest.mark.parametrize(("asked_ms", "granted_ms"), [(100, 400), (TIMEOUT_MS, TIMEOUT_MS), (600_000, 60_000)])
def test_a_lease_follows_from_what_the_servers_grant(server: Ensemble, asked_ms: int, granted_ms: int) -> None:
    """They have limits: here 400 ms to 60 s. The others wait for the lease after a death, and a tenth more."""

    async def body() -> int:
        place = new_place(server, asked_ms)
        a = await Attached(place, "a").open()
        b = await Attached(place, "b").open()
        await until(lambda: a.members() == [b"a", b"b"])
        await b.driver.close()
        await until(lambda: a.members() == [b"a"])
        await a.driver.close()
        return [event.grace_ns for event in a.events if isinstance(event, View)][-1]

    assert asyncio.run(body()) == lease_ns(granted_ms) * 11 // 10


def test_a_lease_does_not_wait_for_an_end_that_recedes(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is appended meanwhile: what was ordered before the renewal is enough."""

    async def body() -> None:
        a = await Attached(place, "a").open()
        exists = Client.exists
        appended = 0

        async def there_is_more(self: Client, path: str, watch: Callable[[], None] | None = None) -> ZnodeStat | None:
            nonlocal appended
            if "/queue/e-" in path and watch is None:
                appended += 1
                a.driver.broadcast(b"%d" % appended)
                await until(lambda: len(a.texts()) == appended)
                a.driver.broadcast(b"%d" % (appended := appended + 1))
            return await exists(self, path, watch)

        def leased_after(position: int) -> bool:
            return any(isinstance(event, Leased) for event in a.events[position:])

        monkeypatch.setattr(Client, "exists", there_is_more)
        for _ in range(3):
            before = len(a.events)
            a.driver.renew()
            await until(partial(leased_after, before))
        assert appended < 50
        monkeypatch.undo()
        await a.driver.leave()
        await a.driver.close()

    asyncio.run(body())


def test_members_are_dropped_one_after_the_other(members: Members) -> None:
    """Whoever is the oldest at the time declares the others dead, also several at once."""
    everyone = members.together("a", "b", "c", "d", "e")

    def survive(names: str) -> bool:
        left = [member for member in everyone if member.name in names]
        return all(member.members() == list(names) for member in left)

    for victims, survivors in (("ab", "cde"), ("d", "ce"), ("c", "e")):
        for member in everyone:
            if member.name in victims:
                member.signal(signal.SIGKILL)
        wait(lambda survivors=survivors: survive(survivors), members)  # type: ignore[misc]
