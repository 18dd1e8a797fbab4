"""Clients whose every block is a register: it only ever shows values that it may have.

Each worker has blocks of its own, so the order of operations on a block is known. A write that failed may have
happened or not; the next read decides, and from then on it stays decided (promises P1 and P4).
"""

from __future__ import annotations

import asyncio
import random

from tests.support import trees

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.volume import Volume

VOLUME = "soak"
BLOCK = 4096
OBJECT_BYTES = 4 << 20
LARGEST_BLOCKS = 32  # of one write
BLOCKS_PER_WORKER = 3 * LARGEST_BLOCKS
WORKER_BYTES = 3 * OBJECT_BYTES
PATIENCE_SECONDS = 30.0  # of a client without a gateway


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

    def __init__(self, index: int, seed: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.index = index
        self.patience_seconds = patience_seconds
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

    async def open(self, address: Address) -> None:
        self.session = await Session.open(address, self.patience_seconds)
        self.volume = await Volume.open(self.session, VOLUME)

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


def check_all(workers: list[Worker], content: bytes) -> None:
    """The whole volume, as a node shows it."""
    for worker in workers:
        for block in range(BLOCKS_PER_WORKER):
            at = worker.offset(block)
            worker.check(content[at : at + BLOCK], range(block, block + 1))
