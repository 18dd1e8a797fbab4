"""What a sheep keeps in memory: little when idle, and bounded however much is written and read through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.cluster import Cluster

from sheepdog.cluster.client.workload import Workload, parse_cell

MIB = 1 << 20
IDLE_MIB = 60
BUSY_MIB = 200  # at any time: overlay (64), receive buffers, open tables (32), and what the interpreter is
PART = 32 * MIB
SIZE = 512 * MIB
# Bodies are in buffers of the next power of two (2 MiB for 1 MiB and its header) while they are written or sent: 8 that
# were received, and 8 that are read, take 32 MiB. As much again for what malloc cannot give back at once.
GROWTH_MIB = 64
LOADS = (("write:1M:8:durable", 1), ("write:1M:8:volatile", 1), ("read:1M:8", 1), ("read:4k:16", 1 / 256))  # MiB each
MOVED_MIB = 4 * GROWTH_MIB  # of each load: if a node kept a quarter of it, it would show


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(3, tmp_path)
    try:
        made.start()
        made.wait_members(3)
        made.format("-c", "3")
        yield made
    finally:
        made.close()


def resident_mib(cluster: Cluster) -> list[int]:
    """Of each sheep, the most it ever had."""
    found = []
    for node in range(cluster.count):
        lines = Path(f"/proc/{cluster.pids(node)[-1]}/status").read_text().splitlines()
        found += [int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")]
    return found


def test_an_idle_sheep_is_small(cluster: Cluster) -> None:
    found = resident_mib(cluster)
    assert len(found) == 3
    assert max(found) < IDLE_MIB, found


def test_large_writes_and_reads_leave_nothing_behind(cluster: Cluster) -> None:
    load = Workload(("127.0.0.1", cluster.port(0)), 16)
    before = resident_mib(cluster)
    for word, size_mib in LOADS:
        cell, moved = parse_cell(word), 0.0
        while moved < MOVED_MIB:
            moved += load.run(cell, 1.0).operations * size_mib
    after = resident_mib(cluster)
    load.close()
    grown = [late - early for early, late in zip(before, after, strict=True)]
    assert max(grown) < GROWTH_MIB, grown


@pytest.mark.soak
def test_a_busy_sheep_is_bounded(cluster: Cluster) -> None:
    data = bytes(range(256)) * (PART // 256)
    cluster.dog("vdi", "create", "data", str(SIZE))
    for _ in range(3):
        for start in range(0, SIZE, PART):
            cluster.dog("vdi", "write", "data", str(start), str(PART), stdin=data)
            assert cluster.try_dog("vdi", "read", "data", str(start), str(PART), check=True).stdout == data
    found = resident_mib(cluster)
    assert max(found) < BUSY_MIB, found
