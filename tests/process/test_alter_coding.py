"""`dog vdi alter-copy` between copies and codes, while the volume is in use and nodes die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial

import pytest
from tests.support.cluster import Cluster, formatted
from tests.support.processes import wait_until

from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.volume import Volume

MIB = 1 << 20
SIZE = 40 * MIB
NODES = 6


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return formatted(new_cluster(NODES))


def strips(cluster: Cluster, node: int) -> int:
    return sum("_" in name for name in cluster.objects(node))


def content(cluster: Cluster, *options: str, node: int = 0) -> bytes:
    return cluster.try_dog("vdi", "read", *options, "v", "0", str(SIZE), node=node, check=True).stdout


def test_there_and_back_with_snapshots(cluster: Cluster) -> None:
    chance = random.Random(1)
    data = bytearray(chance.randbytes(SIZE - 9 * MIB) + bytes(9 * MIB))
    cluster.dog("vdi", "create", "v", str(SIZE))
    cluster.dog("vdi", "write", "v", "0", str(SIZE - 9 * MIB), stdin=bytes(data[: SIZE - 9 * MIB]))
    cluster.dog("vdi", "snapshot", "-s", "old", "v")
    frozen = bytes(data)
    before = "3"
    for wanted, count in (("4:2", 8), ("2:1", 8), ("2", 0)):
        data[5000:9096] = chance.randbytes(4096)
        cluster.dog("vdi", "write", "v", "5000", "4096", stdin=bytes(data[5000:9096]))
        done = cluster.try_dog("vdi", "alter-copy", "-f", "-c", wanted, "v", check=True)
        assert done.stderr.decode() == f"v's redundancy level is set to {wanted}, the old one was {before}.\n"
        assert content(cluster) == data
        assert content(cluster, "-s", "old") == frozen
        assert (sum(strips(cluster, node) for node in range(NODES)) > 0) == bool(count)
        assert len(cluster.dog("vdi", "list", "-r").splitlines()) == 2
        before = wanted
    again = cluster.try_dog("vdi", "alter-copy", "-f", "-c", "2", "v")
    assert again.stderr.decode() == "v's redundancy level is already set to 2, nothing changed.\n"
    done = cluster.try_dog("vdi", "alter-copy", "-f", "-c", "3", "v", check=True)  # as for a volume of its own
    assert done.stderr.decode() == "v's redundancy level is set to 3, the old one was 2.\n"
    cluster.wait_recovered()  # the third copies are made in the epoch that the command began
    assert cluster.dog("vdi", "check", "v") == "finish check&repair v\n"
    cluster.dog("vdi", "delete", "v")
    cluster.dog("vdi", "delete", "-s", "old", "v")
    wait_until(
        lambda: all(not name.startswith("00") for node in range(NODES) for name in cluster.objects(node)),
        30,
        "all data objects are gone",
    )


class Writer:
    """A client that has the volume open all the time, and knows what must be in it."""

    def __init__(self, data: bytes) -> None:
        self.model = bytearray(data)
        self.chance = random.Random(7)
        self.operations = 0

    async def work(self, volume: Volume, stop: Callable[[], bool]) -> None:
        while not stop():
            offset = self.chance.randrange(SIZE - MIB)
            length = self.chance.choice((1, 4096, 70_000, MIB))
            if self.chance.random() < 0.5:
                data = self.chance.randbytes(length)
                await volume.write(offset, data)
                self.model[offset : offset + length] = data
            else:
                assert await volume.read(offset, length) == self.model[offset : offset + length]
            self.operations += 1

    def work_during(self, cluster: Cluster, change: Coroutine[None, None, None]) -> None:
        """Uses the volume until the change is over, and reads it whole then."""
        asyncio.run(self._work_during(cluster, change))

    async def _work_during(self, cluster: Cluster, change: Coroutine[None, None, None]) -> None:
        session = await Session.open(str(cluster.socket(0)))
        volume = await Volume.open(session, "v")
        changing = asyncio.create_task(change)
        await asyncio.gather(changing, self.work(volume, changing.done))
        assert await volume.read(0, SIZE) == self.model
        await volume.close()
        await session.close()


@pytest.mark.parametrize("shift", [20, 23])  # what is above 4 MiB is copied in pieces
@pytest.mark.parametrize(("before", "wanted"), [("3", "4:2"), ("4:2", "3")])
def test_under_load_while_a_node_dies(cluster: Cluster, before: str, wanted: str, shift: int) -> None:
    """The command may fail with its node; the same command goes on from there. No byte is wrong at any time."""
    cluster.dog("vdi", "create", "-z", str(shift), "-c", before, "v", str(SIZE))
    data = random.Random(2).randbytes(SIZE)
    cluster.dog("vdi", "write", "v", "0", str(SIZE), stdin=data)
    writer = Writer(data)

    async def alter() -> None:
        first = asyncio.create_task(
            asyncio.to_thread(cluster.try_dog, "vdi", "alter-copy", "-f", "-c", wanted, "v", node=5)
        )
        await asyncio.sleep(1.2)
        await asyncio.to_thread(cluster.kill, 5)
        await first
        for _ in range(3):
            done = await asyncio.to_thread(cluster.try_dog, "vdi", "alter-copy", "-f", "-c", wanted, "v", node=1)
            if "redundancy level is" in done.stderr.decode():
                break
        text = done.stderr.decode()
        assert f"set to {wanted}" in text, text

    writer.work_during(cluster, alter())
    assert writer.operations > 10
    cluster.wait_recovered()
    assert content(cluster, node=2) == writer.model
    assert (sum(strips(cluster, node) for node in range(NODES - 1)) > 0) == (":" in wanted)
    cluster.start(5)
    cluster.wait_members(NODES)
    cluster.wait_recovered()
    assert cluster.dog("vdi", "check", "v") == "finish check&repair v\n"
    assert len(cluster.dog("vdi", "list", "-r").splitlines()) == 1


def test_more_and_fewer_copies_under_load(cluster: Cluster) -> None:
    """Each time all objects have as many copies as wanted, and no byte was wrong in between."""
    cluster.dog("vdi", "create", "-P", "-c", "2", "v", str(SIZE))
    writer = Writer(bytes(SIZE))

    def everything_has(copies: int) -> bool:
        names = [name for node in range(NODES) for name in cluster.objects(node) if name.startswith("00")]
        return {names.count(name) for name in names} == {copies}

    async def alter() -> None:
        for wanted in (4, 1, 3):
            before = writer.operations
            await asyncio.to_thread(cluster.dog, "vdi", "alter-copy", "-f", "-c", str(wanted), "v")
            await asyncio.to_thread(wait_until, partial(everything_has, wanted), 30, f"{wanted} copies")
            assert writer.operations > before

    writer.work_during(cluster, alter())
    assert {content(cluster, node=node) for node in range(NODES)} == {bytes(writer.model)}


def test_a_client_with_the_old_map_reads_and_writes_on(cluster: Cluster) -> None:
    """The objects that its map names are gone; it learns of that by nothing but the answers."""
    cluster.dog("vdi", "create", "v", str(SIZE))
    data = bytearray(random.Random(3).randbytes(SIZE))
    cluster.dog("vdi", "write", "v", "0", str(SIZE), stdin=bytes(data))

    async def main() -> None:
        session = await Session.open(str(cluster.socket(0)))
        volume = await Volume.open(session, "v")
        await asyncio.to_thread(cluster.dog, "vdi", "alter-copy", "-f", "-c", "4:2", "v", node=1)
        assert not any(name.endswith("00000001") for node in range(NODES) for name in cluster.objects(node))
        assert await volume.read(0, SIZE) == data
        for offset in (5000, 9 * MIB - 100):
            await volume.write(offset, b"new" * 100)
            data[offset : offset + 300] = b"new" * 100
        assert await volume.read(0, SIZE) == data
        await volume.close()
        await session.close()

    asyncio.run(main())
    assert content(cluster, node=4) == data
