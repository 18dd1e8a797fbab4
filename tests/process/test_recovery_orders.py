"""Nodes come and go in every order while fio verifies what it wrote through sheepfs, and qemu-io what it wrote itself.

Nothing is lost, nothing is wrong, and in the end all copies are equal.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import RUNNING, Cluster, started
from tests.support.mounts import SheepFs
from tests.support.processes import end, run
from tests.support.registers import WORKER_BYTES, Worker, check_all

NODES, COPIES = 6, 3
ZONES = (0, 1, 2, 3, 4, 4)  # the last two fail together
MIB = 1 << 20
FIO_BYTES = 48 * MIB
FIO_SECONDS = 120.0  # until it has noticed that it shall end, and verified everything
CHURN_EVENTS, CHURN_SECONDS = 50, 60.0
OBJECT = 4 * MIB


def fio(file: Path, log: Path, seconds: int) -> subprocess.Popen[bytes]:
    """Writes at random, reads back what it wrote while it goes on, and all of it at the end."""
    words = [
        "fio", "--name=verify", f"--filename={file}", f"--size={FIO_BYTES}", "--rw=randwrite", "--bsrange=4k-64k",
        "--ioengine=psync", "--fsync=32", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1",
        "--do_verify=1", "--time_based", f"--runtime={seconds}", "--allow_file_create=0", "--fallocate=none",
        "--verify_state_save=0", "--rate_iops=200",
    ]  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent)


@contextmanager
def under_fio(file: Path, log: Path, seconds: int) -> Iterator[None]:
    """fio runs while the block does; it must find nothing wrong."""
    process = fio(file, log, seconds)
    try:
        yield
        assert process.poll() in (None, 0), log.read_text(errors="replace")
        assert process.wait(FIO_SECONDS) == 0, log.read_text(errors="replace")
    finally:
        if process.poll() is None:
            end([process.pid])
            process.wait()
    text = log.read_text(errors="replace")
    assert "err= 0" in text, text
    assert "verify" not in text.partition("Run status")[2].lower() or "error" not in text.lower(), text


class Patterns:
    """What qemu-io wrote: one byte value for each MiB, another one at each turn."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values: list[int] = []

    def turn(self) -> None:
        """Reads what the turn before wrote, then writes anew."""
        number = (self._values[0] if self._values else 0) + 7
        commands = [f"read -P {value} {at}M 1M" for at, value in enumerate(self._values)]
        self._values = [(number + at) % 250 + 1 for at in range(8)]
        commands += [f"write -P {value} {at}M 1M" for at, value in enumerate(self._values)]
        words = [word for command in commands for word in ("-c", command)]
        done = run(["qemu-io", "-f", "raw", *words, self._file], check=True)
        assert b"Pattern verification failed" not in done.stdout, done.stdout.decode()


def equal_everywhere(cluster: Cluster) -> None:
    """Every data object is on as many nodes as it has copies, with the same bytes."""
    found: dict[str, list[bytes]] = {}
    for node in range(cluster.count):
        for name, path in cluster.objects(node).items():
            if name.startswith("00"):
                found.setdefault(name, []).append(path.read_bytes()[:OBJECT])
    assert found
    for name, copies in found.items():
        assert len(copies) == COPIES, name
        assert len(set(copies)) == 1, name


@pytest.mark.timeout(600)
def test_every_order(
    new_cluster: Callable[..., Cluster], mount_sheepfs: Callable[..., SheepFs], directory: Path
) -> None:
    needs.program("fio")
    needs.program("qemu-io")
    cluster = started(new_cluster(NODES, zones=ZONES))
    cluster.format("-c", str(COPIES))
    for name, size in (("fio", FIO_BYTES), ("patterns", 8 * MIB)):
        cluster.dog("vdi", "create", name, str(size))
    sheepfs = mount_sheepfs(cluster)
    patterns = Patterns(sheepfs.volume("patterns"))
    patterns.turn()
    with under_fio(sheepfs.volume("fio"), directory / "fio.log", 15):
        # It leaves, comes back, and leaves again before anything is healed.
        for _ in range(2):
            cluster.kill(3)
            cluster.wait_members(NODES - 1)
            cluster.start(3)
            cluster.wait_members(NODES)
        cluster.kill(3)
        cluster.wait_members(NODES - 1)
        patterns.turn()
        # Another one goes while the first is still being replaced, and both come back in the other order.
        cluster.wait_recovered()
        cluster.kill(2)
        cluster.wait_members(NODES - 2)
        patterns.turn()
        cluster.start(2)
        cluster.start(3)
        cluster.wait_members(NODES)
        # Somebody is slow for a while.
        cluster.kill(1, signal.SIGSTOP)
        time.sleep(2.0)
        cluster.kill(1, signal.SIGCONT)
        cluster.wait_members(NODES)
        cluster.wait_recovered()
        # A whole zone.
        cluster.kill(4)
        cluster.kill(5)
        cluster.wait_members(NODES - 2)
        patterns.turn()
        cluster.start(5)
        cluster.start(4)
        cluster.wait_members(NODES)
    cluster.wait_recovered()
    patterns.turn()
    first = cluster.try_dog("vdi", "read", "fio", node=0, check=True).stdout
    assert cluster.try_dog("vdi", "read", "fio", node=4, check=True).stdout == first
    sheepfs.release("fio")
    sheepfs.release("patterns")
    sheepfs.unmount()
    cluster.wait_recovered()
    equal_everywhere(cluster)


async def churn(cluster: Cluster, chance: random.Random) -> tuple[int, float]:
    """Joins and leaves of half of the nodes, without waiting for anything to heal; never more than two are away."""
    begin, away, events = time.monotonic(), list[int](), 0
    while events < CHURN_EVENTS:
        if away and (len(away) == COPIES - 1 or chance.random() < 0.5):
            node = away.pop(0)
            await asyncio.to_thread(cluster.start, node)
        else:
            node = chance.choice([node for node in range(3, NODES) if node not in away and cluster.pids(node)])
            await asyncio.to_thread(cluster.kill, node)
            away.append(node)
        events += 1
        await asyncio.sleep(chance.uniform(0.0, 0.4))
    for node in away:
        await asyncio.to_thread(cluster.start, node)
    return events, time.monotonic() - begin


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fifty_joins_and_leaves_in_a_minute(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(NODES))
    cluster.format("-c", str(COPIES))
    cluster.dog("vdi", "create", "soak", str(4 * WORKER_BYTES))

    async def play() -> list[Worker]:
        workers = [Worker(index, index) for index in range(4)]
        stop = asyncio.Event()
        for worker in workers:
            await worker.open(("127.0.0.1", cluster.port(worker.index % 3)))
        tasks = [asyncio.create_task(worker.run(stop)) for worker in workers]
        try:
            events, seconds = await churn(cluster, random.Random(3))
            print(f"{events} joins and leaves in {seconds:.0f} s")
        finally:
            stop.set()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        return workers

    workers = asyncio.run(play())
    cluster.wait_members(NODES)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    for node in range(NODES):
        check_all(workers, cluster.try_dog("vdi", "read", "soak", node=node, check=True).stdout)
    equal_everywhere(cluster)
