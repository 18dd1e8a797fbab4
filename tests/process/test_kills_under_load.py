"""Writers, readers and a killer: every block is a register that only ever shows values it may have.

Each worker has blocks of its own, so the order of operations on a block is known. A write that failed may have
happened or not; the next read decides, and from then on it stays decided (promises P1 and P4). Workers use different
gateways; the gateways themselves are killed too.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable

import pytest
from tests.support import trees
from tests.support.cluster import RUNNING, Cluster, started

from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.volume import Volume

NODES, COPIES, WORKERS = 5, 3, 6
BLOCK = 4096
OBJECT_BYTES = 4 << 20
LARGEST_BLOCKS = 32  # of one write
BLOCKS_PER_WORKER = 3 * LARGEST_BLOCKS
WORKER_BYTES = 3 * OBJECT_BYTES
SHORT_SECONDS, LONG_SECONDS = 12.0, float(os.environ.get("SOAK_SECONDS", "600"))
PATIENCE_SECONDS = 30.0  # of a client whose gateway was killed; the killer starts it again much sooner


class Register:
    """The values that one block may show now, as the sequence numbers of writes; 0: never written."""

    def __init__(self) -> None:
        self.may_be = {0}

    def written(self, number: int, *, acknowledged: bool) -> None:
        self.may_be = {number} if acknowledged else {*self.may_be, number}

    def shown(self, number: int) -> bool:
        """A read has shown `number`; False if it must not."""
        if number not in self.may_be:
            return False
        self.may_be = {number}
        return True


class Worker:
    """One client with blocks of its own on the shared volume."""

    def __init__(self, index: int, seed: int) -> None:
        self.index = index
        self.random = random.Random(seed)
        self.registers = [Register() for _ in range(BLOCKS_PER_WORKER)]
        self.number = 0
        self.done = 0
        self.failed = 0

    def offset(self, block: int) -> int:
        """Runs of LARGEST_BLOCKS blocks, each at the start of an object."""
        run, within = divmod(block, LARGEST_BLOCKS)
        return self.index * WORKER_BYTES + run * OBJECT_BYTES + within * BLOCK

    def content(self, block: int, number: int) -> bytes:
        return trees.pattern((self.index << 48) + (number << 16) + block, BLOCK) if number else bytes(BLOCK)

    async def open(self, address: tuple[str, int]) -> None:
        self.session = await Session.open(address, PATIENCE_SECONDS)
        self.volume = await Volume.open(self.session, "soak")

    async def run(self, stop: asyncio.Event) -> None:
        try:
            while not stop.is_set():
                await self.step(self.volume)
                self.done += 1
        finally:
            await self.session.close()

    async def step(self, volume: Volume) -> None:
        first = self.random.randrange(BLOCKS_PER_WORKER)
        rest = LARGEST_BLOCKS - first % LARGEST_BLOCKS
        count = min(rest, self.random.choice((1, 1, 1, 2, 5, LARGEST_BLOCKS)))
        blocks = range(first, min(first + count, BLOCKS_PER_WORKER))
        if self.random.random() < 0.6:
            await self.write(volume, blocks)
        else:
            await self.read(volume, blocks)

    async def write(self, volume: Volume, blocks: range) -> None:
        self.number += 1
        data = b"".join(self.content(block, self.number) for block in blocks)
        acknowledged = False
        try:
            await volume.write(self.offset(blocks[0]), data, self.random.random() < 0.3)
            acknowledged = True
        except OSError:
            self.failed += 1
        for block in blocks:
            self.registers[block].written(self.number, acknowledged=acknowledged)

    async def read(self, volume: Volume, blocks: range) -> None:
        try:
            data = bytes(await volume.read(self.offset(blocks[0]), len(blocks) * BLOCK))
        except OSError:
            self.failed += 1
            return
        self.check(data, blocks)

    def check(self, data: bytes, blocks: range) -> None:
        for position, block in enumerate(blocks):
            seen = data[position * BLOCK : (position + 1) * BLOCK]
            register = self.registers[block]
            number = next((n for n in sorted(register.may_be) if self.content(block, n) == seen), None)
            assert number is not None, self.explain(block, seen)
            assert register.shown(number)

    def explain(self, block: int, seen: bytes) -> str:
        shown = next((n for n in range(self.number, -1, -1) if self.content(block, n) == seen), "no write's")
        allowed = sorted(self.registers[block].may_be)
        return f"worker {self.index}, block {block} at {self.offset(block):#x}: shows {shown}, may be {allowed}"


async def killer(cluster: Cluster, chance: random.Random, until: float) -> int:
    """Kills a node, lets the others work, starts it again, waits until everything is healed; how often."""
    kills = 0
    while time.monotonic() < until:
        node = chance.randrange(NODES)
        await asyncio.to_thread(cluster.kill, node)
        await asyncio.sleep(chance.uniform(0.1, 2.0))
        if chance.random() < 0.3:  # in the middle of the healing, another one goes: one copy is left
            other = chance.choice([each for each in range(NODES) if each != node])
            await asyncio.to_thread(cluster.wait_members, NODES - 1)
            await asyncio.to_thread(cluster.wait_recovered)
            await asyncio.to_thread(cluster.kill, other)
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            await asyncio.to_thread(cluster.start, other)
        await asyncio.to_thread(cluster.start, node)
        await asyncio.to_thread(cluster.wait_members, NODES)
        await asyncio.to_thread(cluster.wait_status, RUNNING)
        await asyncio.to_thread(cluster.wait_recovered)
        kills += 1
    return kills


async def play(cluster: Cluster, seconds: float, seed: int) -> list[Worker]:
    workers = [Worker(index, seed * 100 + index) for index in range(WORKERS)]
    stop = asyncio.Event()
    for worker in workers:
        await worker.open(("127.0.0.1", cluster.port(worker.index % NODES)))
    tasks = [asyncio.create_task(worker.run(stop)) for worker in workers]
    try:
        kills = await killer(cluster, random.Random(seed), time.monotonic() + seconds)
        assert kills > 0
    finally:
        stop.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in done:
        if isinstance(outcome, BaseException):
            raise outcome
    return workers


@pytest.mark.timeout(LONG_SECONDS + 600)
@pytest.mark.parametrize(
    ("seconds", "seed"), [(SHORT_SECONDS, 1), pytest.param(LONG_SECONDS, 2, marks=pytest.mark.soak)]
)
def test_kills_under_load(new_cluster: Callable[..., Cluster], seconds: float, seed: int) -> None:
    cluster = started(new_cluster(NODES))
    cluster.format("-c", str(COPIES))
    cluster.dog("vdi", "create", "soak", str(WORKERS * WORKER_BYTES))
    workers = asyncio.run(play(cluster, seconds, seed))
    assert all(worker.done > 10 for worker in workers), [worker.done for worker in workers]
    for node in range(NODES):
        content = cluster.try_dog("vdi", "read", "soak", node=node, check=True).stdout
        for worker in workers:
            for block in range(BLOCKS_PER_WORKER):
                at = worker.offset(block)
                worker.check(content[at : at + BLOCK], range(block, block + 1))
