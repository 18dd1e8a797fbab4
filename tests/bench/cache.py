"""The object cache on against off, in one run: `.venv/bin/python -m tests.bench.cache`.

Three nodes with three copies, and two gateways without disks: one with a cache, one without. They take turns in short
slices, of which the median counts: what else the machine does meets both.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.bench.administration import touch_memory
from tests.support.cluster import Cluster
from tests.support.processes import wait_until

from sheepdog.cluster.client.blocking import BlockingVolume

OBJECTS, OBJECT_BYTES, BLOCK = 8, 4 << 20, 4096
BLOCKS = OBJECTS * OBJECT_BYTES // BLOCK
ON, OFF = 3, 4  # nodes
SPARE_BYTES = 256 << 20  # more than is kept here: a virtual machine pays the host for the first touch of every page
# C Sheepdog 1.0.1 without a cache, through a node that stores, on a quiet machine: -n, for `fsync` O_DSYNC per write.
C_RATES = {"cold": 4267, "read": 4267, "write": 2529, "fsync": 1639}
SLICES = {"cold": (60, 50), "read": (60, 50), "write": (60, 50), "fsync": (20, 10)}  # how many, operations in each


def operate(volume: BlockingVolume, kind: str, blocks: list[int], data: bytes) -> None:
    for block in blocks:
        offset = block * BLOCK
        if kind in ("cold", "read"):
            volume.read(offset, BLOCK)
        else:
            volume.write(offset, data)
            if kind == "fsync":
                volume.flush()


def cpu_ns(cluster: Cluster, node: int) -> int:
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in cluster.pids(node))


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        cluster = Cluster(5, Path(directory), options=())
        try:
            measure(cluster)
        finally:
            cluster.close()


def claim(cluster: Cluster, volume: BlockingVolume) -> None:
    """The first requests go past the cache, until all nodes know whose the volume is."""

    def is_claimed() -> bool:
        volume.read(0, BLOCK)
        return bool(json.loads(cluster.dog("vdi", "cache", "info", "--json", node=ON))["misses"])

    wait_until(is_claimed, 10, "the claim")


def measure(cluster: Cluster) -> None:
    cluster.start(extra={ON: ("-g", "-w", "object:size=256M"), OFF: ("-g",)})
    cluster.wait_members(5)
    cluster.format("-c", "3")
    volumes = {}
    for node in (ON, OFF):
        cluster.dog("vdi", "create", f"v{node}", str(BLOCKS * BLOCK))
        volumes[node] = BlockingVolume.open(("127.0.0.1", cluster.port(node)), f"v{node}", object_cache=True)
        for index in range(OBJECTS):  # every object exists
            volumes[node].write(index * OBJECT_BYTES, bytes(BLOCK))
    claim(cluster, volumes[ON])
    print("         cache    none   ratio   C, no cache   CPU of the gateway, us: cache, none")
    for kind in SLICES:
        touch_memory(SPARE_BYTES)
        rates, cpu = compare(cluster, volumes, kind)
        on, off = rates[ON], rates[OFF]
        print(f"{kind:<6} {on:7.0f} {off:7.0f} {on / off:7.2f} {C_RATES[kind]:13} {cpu[ON]:32.0f}, {cpu[OFF]:.0f}")


def compare(
    cluster: Cluster, volumes: dict[int, BlockingVolume], kind: str
) -> tuple[dict[int, float], dict[int, float]]:
    """Operations a second of one client at depth 1 at random places, and CPU us of the gateway for each; by node."""
    slices, length = SLICES[kind]
    places = random.Random(5).sample(range(BLOCKS), slices * length)  # the same for every kind
    data = os.urandom(BLOCK)
    rates: dict[int, list[float]] = {node: [] for node in volumes}
    cpu = dict.fromkeys(volumes, 0.0)
    for volume in volumes.values():
        volume.flush()
    for number in range(slices):
        blocks = places[number * length : (number + 1) * length]
        for node, volume in volumes.items():
            before, start = cpu_ns(cluster, node), time.perf_counter()
            operate(volume, kind, blocks, data)
            rates[node].append(length / (time.perf_counter() - start))
            cpu[node] += (cpu_ns(cluster, node) - before) / 1000 / len(places)
    return {node: median(found) for node, found in rates.items()}, cpu


if __name__ == "__main__":
    main()
