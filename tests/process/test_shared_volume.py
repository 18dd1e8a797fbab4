"""Two clients of one volume through two gateways: what one was told is written, the other one reads."""

from __future__ import annotations

import asyncio
import errno
import random
import signal
from collections.abc import Awaitable, Callable

import pytest
from tests.support import trees
from tests.support.cluster import Cluster, started

from sheepdog.cluster.client import requests, shared
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.shared import SharedVolume
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire.structures import pack_names

MIB = 1 << 20
BLOCK = 4096
OBJECT = 4 * MIB
SIZE = 8 * OBJECT
SECONDS = 100.0
OBJECTS = 30
PAUSE_SECONDS = 0.002


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    """It enforces locks, and has a volume of eight objects, all holes."""
    made = started(new_cluster(3))
    made.format("-l", "-c", "2")
    made.dog("vdi", "create", "v", str(SIZE))
    return made


def both(cluster: Cluster, body: Callable[[SharedVolume, SharedVolume], Awaitable[None]]) -> None:
    """Runs `body` with clients behind the first and the second node."""

    async def run() -> None:
        async with asyncio.timeout(SECONDS):
            one, other = [await SharedVolume.open(str(cluster.socket(node)), "v") for node in range(2)]
            await body(one, other)
            await one.close()
            await other.close()

    asyncio.run(run())


def test_holes_objects_discards_and_sizes_are_seen_at_once(cluster: Cluster) -> None:
    async def body(one: SharedVolume, other: SharedVolume) -> None:
        assert await other.read(0, BLOCK) == bytes(BLOCK)
        await one.write(0, b"1" * BLOCK)
        assert await other.read(0, BLOCK) == b"1" * BLOCK, "what was a hole"
        await other.write(BLOCK, b"2" * BLOCK)
        assert await one.read(0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
        await one.zero(0, OBJECT)
        assert await other.read(0, BLOCK) == bytes(BLOCK), "what was given back"
        await other.write(OBJECT - BLOCK, b"3" * 2 * BLOCK, durable=True)
        assert await one.read(OBJECT - BLOCK, 2 * BLOCK) == b"3" * 2 * BLOCK
        await one.resize(2 * SIZE)
        await other.refresh()
        assert other.size == 2 * SIZE
        await other.write(2 * SIZE - BLOCK, b"4" * BLOCK)
        assert await one.read(2 * SIZE - BLOCK, BLOCK) == b"4" * BLOCK
        with pytest.raises(OSError) as caught:
            await one.write(2 * SIZE, b"x")
        assert caught.value.errno == errno.ENOSPC

    both(cluster, body)


def test_a_snapshot_is_taken_under_both(cluster: Cluster) -> None:
    async def open_snapshot(node: int) -> None:
        """As QEMU does it, which reads a snapshot beside."""
        session = await Session.open(str(cluster.socket(node)))
        request = requests.lock(b"v", shared=True)
        request.payload = pack_names(b"v", b"then")
        request.header[12:16] = len(request.payload).to_bytes(4, "little")
        request.header[36:40] = bytes(4)  # lock_type: normal
        await session.call(request.header, request.payload)
        await session.close()

    async def body(one: SharedVolume, other: SharedVolume) -> None:
        await one.write(0, b"1" * 2 * BLOCK)
        assert await other.read(0, BLOCK) == b"1" * BLOCK
        await asyncio.to_thread(cluster.dog, "vdi", "snapshot", "-s", "then", "v", node=2)
        await open_snapshot(0)  # the client behind it still says the vid that is the snapshot's by now
        await other.write(0, b"2" * BLOCK)
        assert await one.read(0, 2 * BLOCK) == b"2" * BLOCK + b"1" * BLOCK
        await one.write(BLOCK, b"3" * BLOCK)
        assert await other.read(0, 2 * BLOCK) == b"2" * BLOCK + b"3" * BLOCK
        await one.flush()

    both(cluster, body)
    assert cluster.dog("vdi", "read", "-s", "then", "v", "0", str(2 * BLOCK)) == "1" * 2 * BLOCK
    assert cluster.dog("vdi", "read", "v", "0", str(2 * BLOCK)) == "2" * BLOCK + "3" * BLOCK


def test_nothing_is_lost_between_two_that_write_to_the_same_objects(cluster: Cluster) -> None:
    """Blocks of one object belong to both clients in turn; snapshots are taken, objects given back and made again."""
    chance = random.Random(5)
    content = [0] * (SIZE // BLOCK)

    async def write(volume: SharedVolume, blocks: list[int], first: int) -> None:
        for number, block in enumerate(blocks, first):
            await volume.write(block * BLOCK, trees.pattern(number, BLOCK))
            content[block] = number

    async def body(one: SharedVolume, other: SharedVolume) -> None:
        for step in range(12):
            touched = chance.sample(range(len(content)), 40)
            await asyncio.gather(
                write(one, touched[:20], 1000 * step + 1), write(other, touched[20:], 1000 * step + 501)
            )
            if step % 4 == 2:
                await asyncio.to_thread(cluster.dog, "vdi", "snapshot", "-s", f"step{step}", "v", node=2)
            if step % 4 == 3:
                number = chance.randrange(SIZE // OBJECT)
                await chance.choice((one, other)).zero(number * OBJECT, OBJECT)
                content[number * OBJECT // BLOCK : (number + 1) * OBJECT // BLOCK] = [0] * (OBJECT // BLOCK)
            for volume in (one, other):
                for block in (*touched, *chance.sample(range(len(content)), 10)):
                    expected = trees.pattern(content[block], BLOCK) if content[block] else bytes(BLOCK)
                    assert await volume.read(block * BLOCK, BLOCK) == expected, f"block {block} in step {step}"

    both(cluster, body)


def test_no_reader_beside_a_reload_goes_by_the_old_map(cluster: Cluster) -> None:
    """Requests come whether others have ended or not: while one of them reads the map again, the next have the old."""
    written = 0  # objects, one after the other
    ended = False

    async def look(volume: SharedVolume, number: int) -> None:
        shown = await volume.read((number - 1) * OBJECT, BLOCK)
        assert int.from_bytes(shown, "little") == number, f"object {number - 1} is not there"

    async def keep_looking(volume: SharedVolume) -> None:
        async with asyncio.TaskGroup() as readers:
            while not ended:
                if written:
                    readers.create_task(look(volume, written))
                await asyncio.sleep(PAUSE_SECONDS)

    async def body(one: SharedVolume, other: SharedVolume) -> None:
        nonlocal written, ended
        await one.resize(OBJECTS * OBJECT)
        await other.refresh()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_looking(other))
            for index in range(OBJECTS):
                await one.write(index * OBJECT, (index + 1).to_bytes(BLOCK, "little"))
                written = index + 1
            ended = True

    both(cluster, body)


def test_a_gateway_that_comes_back_is_told_before_anything_else(cluster: Cluster) -> None:
    """The node of the one client is away while the other writes; its share of the lock has ended meanwhile."""

    async def body(one: SharedVolume, other: SharedVolume) -> None:
        await one.write(0, b"1" * BLOCK)
        await other.read(0, BLOCK)
        await asyncio.to_thread(cluster.kill, 1)
        await asyncio.to_thread(cluster.wait_members, 2, [0, 2])
        await one.write(OBJECT, b"2" * BLOCK)
        await asyncio.to_thread(cluster.start, 1)
        assert await other.read(OBJECT, BLOCK) == b"2" * BLOCK
        await one.write(2 * OBJECT, b"3" * BLOCK)
        assert await other.read(2 * OBJECT, BLOCK) == b"3" * BLOCK

    both(cluster, body)


def test_patience_ends_and_a_stopped_gateway_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "ANSWER_LIMIT_S", 1.0)
    monkeypatch.setattr(shared, "PATIENCE_S", 3.0)

    async def body(one: SharedVolume, other: SharedVolume) -> None:
        await one.write(0, b"1" * BLOCK)
        cluster.kill(1, signal.SIGSTOP)
        with pytest.raises(OSError) as caught:
            await other.write(0, b"2" * BLOCK)
        assert caught.value.errno == errno.EIO
        cluster.kill(1, signal.SIGCONT)
        await asyncio.to_thread(cluster.wait_members, 3)
        monkeypatch.setattr(shared, "ANSWER_LIMIT_S", 20.0)
        monkeypatch.setattr(shared, "PATIENCE_S", 30.0)
        await other.write(0, b"3" * BLOCK)
        assert await one.read(0, BLOCK) == b"3" * BLOCK

    both(cluster, body)


def test_the_lock_is_shared_or_exclusive(cluster: Cluster) -> None:
    def refusal(code: int) -> str:
        return f"0x{code:02x}"

    async def lock_alone(node: int) -> None:
        session = await Session.open(str(cluster.socket(node)))
        request = requests.lock(b"v", shared=True)
        request.header[36:40] = bytes(4)  # lock_type: normal, as QEMU does
        try:
            await session.call(request.header, request.payload)
        finally:
            await session.close()

    async def body() -> None:
        one = await SharedVolume.open(str(cluster.socket(0)), "v")
        again = await SharedVolume.open(str(cluster.socket(0)), "v")  # after a death of the first: no obstacle
        with pytest.raises(OSError, match=refusal(Result.VDI_LOCKED)):
            await lock_alone(2)
        await again.close()
        await one.close()
        await lock_alone(2)
        with pytest.raises(OSError) as caught:
            await SharedVolume.open(str(cluster.socket(0)), "v")
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError) as caught:
            await SharedVolume.open(str(cluster.socket(0)), "nobody")
        assert caught.value.errno == errno.ENOENT

    asyncio.run(body())
