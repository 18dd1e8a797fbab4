"""The zookeeper driver where others write below its path, and with servers that do not serve."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import pytest
from tests.support.attached import Attached, said_to_both, until
from tests.support.processes import BIN, run, wait_until
from tests.support.zookeeper import Ensemble, running_servers

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Leased, Lost, Suspended
from sheepdog.cluster.drivers.zookeeper_log import position_path

TIMEOUT_MS = 20_000  # nobody dies here: no pause of a busy machine is taken for a death
_numbers = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Ensemble]:
    """One server for all tests of this file; each uses a place of its own."""
    with running_servers() as ensemble:
        yield ensemble


@pytest.fixture
def place(server: Ensemble) -> str:
    """The driver's argument for a cluster of the test's own."""
    return f"{server.address}/test{next(_numbers)},timeout={TIMEOUT_MS}"


def test_a_member_whose_place_is_deleted_is_lost(place: str) -> None:
    async def body() -> None:
        a = await Attached(place, "a").open()
        b = await Attached(place, "b").open()
        await b.driver._there.delete(b.driver._member_path(b.driver._me))
        await until(lambda: isinstance(b.events[-1], Lost))
        await until(lambda: a.members() == [b"a"])
        b.driver.broadcast(b"never")
        await b.driver.close()
        a.driver.broadcast(b"x")
        await until(lambda: a.texts() == [b"x"])
        await a.driver.close()

    asyncio.run(body())


def test_what_others_put_below_our_path_disturbs_nobody(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses up numbers of the log, it looks like entries or members: what is ours goes on, in one order."""
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.CHECKPOINT_ENTRIES", 20)
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.PUBLISH_ENTRIES", 5)
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.GAP_ROUNDS", 1)

    async def body() -> None:
        a = await Attached(place, "a").open()
        b = await Attached(place, "b").open()
        client, base = a.driver._there, a.driver._base
        for name, data in (("foreign", b"x"), ("6e6f626f6479", b"[]"), ("6e6f626f647a", b'{"position": "x"}')):
            await client.create(f"{base}/members/{name}", data)
        for index in range(60):
            if index % 10 == 5:
                await client.create(f"{base}/queue/stray{index}", b"not an entry")
                await client.create(f"{base}/queue/lock-", b"", sequence=True)
            if index % 10 == 7:
                await client.create(f"{base}/queue/e-", b"hello", sequence=True)
            await said_to_both(a, b, index)
        assert sorted(a.texts(), key=int) == [b"%d" % index for index in range(60)]
        assert [e for e in a.events[-100:] if not isinstance(e, Leased)][-40:] == [
            e for e in b.events if not isinstance(e, Leased)
        ][-40:]

        async def entries() -> int:
            return len([name for name in await client.children(f"{base}/queue") if name.startswith("e-")])

        async with asyncio.timeout(20):
            while await entries() > 40:
                await asyncio.sleep(0.1)
        await client.create(f"{base}/queue/stray", b"")
        c = await Attached(place, "c").open()
        assert c.members() == [b"a", b"b", b"c"]
        strays = [name for name in await client.children(f"{base}/queue") if not name.startswith("e-")]
        assert len(strays) == 13, "they are left alone"
        for one in (a, b, c):
            assert not [event for event in one.events if isinstance(event, (Lost, Suspended))]
            await one.driver.leave()
            await one.driver.close()

    asyncio.run(body())


@pytest.mark.parametrize("ahead", [9999, 1, 0])
def test_a_name_of_the_future_takes_nobody_there(place: str, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Somebody creates, by name, what ZooKeeper would give out later: the order goes on up to it, and beyond."""
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.GAP_ROUNDS", 1)

    async def body() -> None:
        a = await Attached(place, "a").open()
        b = await Attached(place, "b").open()
        client, base = a.driver._there, a.driver._base
        following = a.driver._position + 1 + ahead  # the foreign name itself counts as one
        for number in (following, following + 1, following + 3):
            await client.create(f"{base}/queue/{position_path(number)}", b"x")
        await asyncio.sleep(0.1)
        a.driver.renew()
        for index in range(8):
            await said_to_both(a, b, index)
        assert a.texts() == b.texts() == [b"%d" % index for index in range(8)]
        c = await Attached(place, "c").open()
        assert c.members() == [b"a", b"b", b"c"]
        b.driver.broadcast(b"8")
        await until(lambda: a.texts()[8:] == b.texts()[8:] == c.texts() == [b"8"])
        for one in (a, b, c):
            assert not [event for event in one.events if isinstance(event, Lost)]
            await one.driver.close()

    asyncio.run(body())


def test_a_znode_without_data_is_nobodys(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZooKeeper tells nothing from empty; whoever is there, and whoever comes, goes over it."""
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.GAP_ROUNDS", 1)

    async def body() -> None:
        a = await Attached(place, "a").open()
        kazoo, base = a.driver._there._kazoo, a.driver._base
        for path, options in (("queue/e-", {"sequence": True}), ("queue/stray", {}), ("members/6e6f", {})):
            await asyncio.to_thread(kazoo.create, f"{base}/{path}", None, **options)
        a.driver.broadcast(b"1")
        await until(lambda: a.texts() == [b"1"])
        b = await Attached(place, "b").open()
        assert b.members() == [b"a", b"b"]
        for one in (a, b):
            assert not [event for event in one.events if isinstance(event, Lost)]
            await one.driver.close()

    asyncio.run(body())


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.CONNECT_PATIENCE_S", 0.5)
    with pytest.raises(UsageError, match=r"zookeeper driver: 127\.0\.0\.1:9: no server of the ensemble can be reached"):
        asyncio.run(Attached("127.0.0.1:9", "a").open())


@pytest.fixture
def mute(directory: Path, teardown: ExitStack) -> list[str]:
    """The addresses of a server without a quorum and of one that hangs: they take connections, and that is all."""
    ensemble = Ensemble(directory, 3)
    teardown.callback(ensemble.close)
    lonely, silent, _ = ensemble.servers
    hung = teardown.enter_context(socket.create_server((silent.host, silent.port)))
    assert hung.fileno() >= 0
    lonely.start()

    def listens() -> bool:
        with suppress(OSError), socket.create_connection((lonely.host, lonely.port), 1.0):
            return True
        return False

    wait_until(listens, 60.0, "the server listens")
    return [lonely.address, silent.address]


def test_servers_that_begin_no_session(mute: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be reached, which is not enough: who starts a daemon is told, by one line and its status."""
    said = [f"zookeeper driver: {address}: the servers take connections but begin no session" for address in mute]
    stores = [directory / f"store{number}" for number in range(len(mute))]
    with ThreadPoolExecutor() as pool:  # each waits for as long as an election may take
        done = pool.map(start, mute, stores)
    for one, line, store in zip(done, said, stores, strict=True):
        assert (one.returncode, one.stderr.count(b"\n")) == (1, 1), one.stderr
        assert one.stderr.decode().startswith(line)
        assert "can be reached" not in (store / "sheep.log").read_text()
    monkeypatch.setattr("sheepdog.cluster.drivers.zookeeper.CONNECT_PATIENCE_S", 0.5)
    for address, line in zip(mute, said, strict=True):
        with pytest.raises(UsageError, match=f"^{line}"):
            asyncio.run(Attached(address, "a").open())


def start(address: str, store: Path) -> subprocess.CompletedProcess[bytes]:
    return run([BIN / "sheep", "-c", f"zookeeper:{address}", "-y", "127.0.0.1", "-n", store], check=False)
