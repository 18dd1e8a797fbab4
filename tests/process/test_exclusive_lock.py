"""A volume for one client alone, behind gateways that die: others are refused, whichever door they come through."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest
from tests.support.cluster import Cluster, started, with_locks

from sheepdog.cluster.client import exclusive
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.shared import SharedVolume
from sheepdog.cluster.core.errors import Result
from sheepdog.frontends.nbd.exports import Exports
from sheepdog.frontends.nbd.parameters import Parameters
from sheepdog.frontends.sheepfs.cluster import Volume
from sheepdog.frontends.sheepfs.gateway import GatewayCluster

BLOCK = 4096
MIB = 1 << 20
SECONDS = 40.0


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return with_locks(new_cluster(3))


def behind(cluster: Cluster, node: int) -> GatewayCluster:
    return GatewayCluster(("127.0.0.1", cluster.port(node)))


def play(body: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS):
            await body()

    asyncio.run(run())


def owners(cluster: Cluster, node: int = 1) -> list[int]:
    """The nodes that hold a lock."""
    text = cluster.dog("vdi", "lock", "list", node=node)
    return [node for node in range(cluster.count) if f"port:{cluster.port(node)}" in text]


async def refused(opening: Awaitable[object]) -> None:
    with pytest.raises(OSError) as caught:
        await opening
    assert caught.value.errno == errno.EBUSY


async def until_owned_by_another(cluster: Cluster, node: int) -> None:
    while not (found := await asyncio.to_thread(owners, cluster, 1)) or node in found:
        await asyncio.sleep(0.2)


def test_no_door_opens_a_volume_that_somebody_has_for_himself(cluster: Cluster) -> None:
    async def body() -> None:
        volume = await behind(cluster, 0).open_exclusive("v", False)
        assert owners(cluster) == [0]
        for node in range(3):
            await refused(behind(cluster, node).open_exclusive("v", False))
        await refused(SharedVolume.open(str(cluster.socket(1)), "v"))
        nbd = Exports(Parameters(address=("127.0.0.1", cluster.port(1))))
        with pytest.raises(OSError, match=r"^\[Errno 16\] v is locked by another client \(dog vdi lock list; .*\)$"):
            nbd.open("v", read_only=False)
        cluster.dog("vdi", "snapshot", "-s", "tag", "v", node=2)
        await volume.write(0, b"1" * BLOCK)  # to the volume that goes on, which has the lock
        await refused(behind(cluster, 1).open_exclusive("v", False))
        await volume.close()
        assert owners(cluster) == []
        volume = await behind(cluster, 1).open_exclusive("v", False)
        assert bytes(await volume.read(0, BLOCK)) == b"1" * BLOCK
        await volume.close()

    play(body)


def test_the_lock_goes_along_to_another_gateway(cluster: Cluster) -> None:
    async def body() -> None:
        volume = await behind(cluster, 0).open_exclusive("v", False)
        await volume.write(0, b"1" * BLOCK)
        cluster.kill(0)
        await until_owned_by_another(cluster, 0)  # nothing asks for data: an idle client looks after its lock too
        await refused(behind(cluster, 1).open_exclusive("v", False))
        await volume.write(0, b"2" * BLOCK)
        cluster.start(0)
        cluster.wait_members(3)
        await volume.close()
        assert owners(cluster) == []

    play(body)


def test_a_client_that_has_lost_its_lock_touches_nothing_more(cluster: Cluster) -> None:
    async def body() -> None:
        first = await behind(cluster, 0).open_exclusive("v", False)
        await first.write(0, b"1" * BLOCK)
        cluster.dog("vdi", "lock", "unlock", "v")
        second = await behind(cluster, 1).open_exclusive("v", False)
        await second.write(0, b"2" * BLOCK)
        cluster.kill(0)
        await fails(first)
        assert (first.is_lost, second.is_lost) == (True, False)
        assert bytes(await second.read(0, BLOCK)) == b"2" * BLOCK
        with pytest.raises(OSError, match="Input/output error"):
            await first.close()
        assert owners(cluster) == [1], "the other one's lock stands"
        await second.close()

    async def fails(volume: Volume) -> None:
        for request in (volume.write(0, b"1" * BLOCK), volume.read(0, BLOCK), volume.flush()):
            with pytest.raises(OSError) as caught:
                await request
            assert caught.value.errno == errno.EIO

    play(body)


def test_a_lock_that_was_left_behind_is_known_by_its_node_and_its_time(cluster: Cluster) -> None:
    one, other = (Connection(("127.0.0.1", cluster.port(node)), 0) for node in (0, 1))
    left = exclusive.take(one, b"v")
    assert left is not None
    assert exclusive.take(other, b"v", left) == exclusive.held(one, b"v")
    now = exclusive.held(one, b"v")
    assert now is not None
    assert now.node.port == cluster.port(1)
    assert not exclusive.release(one, b"v", left), "it is another node's by now"
    other.close()
    cluster.kill(1)
    cluster.wait_members(2)
    cluster.start(1)
    cluster.wait_members(3)
    other = Connection(("127.0.0.1", cluster.port(1)), 0)
    exclusive.take(other, b"v")  # somebody else, after the node had left
    with pytest.raises(SheepError) as caught:
        exclusive.take(one, b"v", now)
    assert caught.value.result == Result.VDI_LOCKED
    one.close()
    other.close()


def test_without_enforced_locks_nobody_is_kept_out(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(1))
    cluster.format("-c", "1")
    cluster.dog("vdi", "create", "v", "16M")

    async def body() -> None:
        volumes = [await behind(cluster, 0).open_exclusive("v", False) for _ in range(2)]
        for volume in volumes:
            await volume.close()

    play(body)


def test_an_nbd_server_whose_gateway_restarts_has_the_lock_again_or_nothing(cluster: Cluster) -> None:
    exports = Exports(Parameters(address=("127.0.0.1", cluster.port(0)), volumes=["v"]))
    mine = exports.open("v", read_only=False)
    mine.volume.write(0, b"1" * BLOCK)
    restart(cluster)
    mine.volume.write(0, b"2" * BLOCK)  # a request brings it to the gateway again
    assert owners(cluster) == [0]
    restart(cluster)
    other = Exports(Parameters(address=("127.0.0.1", cluster.port(1))))
    theirs = other.open("v", read_only=False)  # nobody has asked since, so nobody has the lock
    theirs.volume.write(0, b"3" * BLOCK)
    for _ in range(2):
        with pytest.raises(OSError, match=r"somebody else has locked it|no gateway"):
            mine.volume.write(0, b"4" * BLOCK)
    with pytest.raises(OSError, match="somebody else has locked it"):
        mine.volume.flush()
    assert bytes(theirs.volume.read(0, BLOCK)) == b"3" * BLOCK
    other.close(theirs)
    with pytest.raises(OSError, match="somebody else has locked it"):
        exports.close(mine)  # not even now: what it knows of the volume is old


def restart(cluster: Cluster) -> None:
    cluster.kill(0)
    cluster.wait_members(2)
    cluster.start(0)
    cluster.wait_members(3)
