"""Writers, readers and a killer (tests/support/registers.py). The gateways of the clients are killed too."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable

import pytest
from tests.support.cluster import RUNNING, Cluster, started
from tests.support.registers import WORKER_BYTES, Worker, check_all

NODES, COPIES, WORKERS = 5, 3, 6
SHORT_SECONDS, LONG_SECONDS = 12.0, float(os.environ.get("SOAK_SECONDS", "600"))


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
        check_all(workers, cluster.try_dog("vdi", "read", "soak", node=node, check=True).stdout)
