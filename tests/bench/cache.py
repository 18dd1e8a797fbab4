"""The object cache on against off, in one run: `.venv/bin/python -m tests.bench.cache`.

Three nodes with three copies, and two gateways without disks: one with a cache, one without. Best of three rounds.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.processes import wait_until

from sheepdog.cluster.client.blocking import BlockingVolume

OBJECTS, OBJECT_BYTES, BLOCK = 8, 4 << 20, 4096
ON, OFF = 3, 4  # nodes
# C Sheepdog 1.0.1 without a cache, through a node that stores, on a quiet machine: -n, for `fsync` O_DSYNC per write.
C_RATES = {"cold": 4267, "read": 4267, "write": 2529, "fsync": 1639}
COUNTS = {"cold": 1500, "read": 1500, "write": 1500, "fsync": 120}


def rate(volume: BlockingVolume, kind: str) -> float:
    """Operations a second of one client at depth 1, at random places."""
    volume.flush()
    places, data = random.Random(5), os.urandom(BLOCK)
    start = time.perf_counter()
    for _ in range(COUNTS[kind]):
        offset = places.randrange(OBJECTS * OBJECT_BYTES // BLOCK) * BLOCK
        if kind in ("cold", "read"):
            volume.read(offset, BLOCK)
        else:
            volume.write(offset, data)
            if kind == "fsync":
                volume.flush()
    return COUNTS[kind] / (time.perf_counter() - start)


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
        cluster.dog("vdi", "create", f"v{node}", "32M")
        volumes[node] = BlockingVolume.open(("127.0.0.1", cluster.port(node)), f"v{node}", object_cache=True)
        for index in range(OBJECTS):  # every object exists
            volumes[node].write(index * OBJECT_BYTES, bytes(BLOCK))
    claim(cluster, volumes[ON])
    best: dict[tuple[str, int], float] = {}
    for kind in ("cold", *("read", "write", "fsync") * 3):
        for node in (ON, OFF):
            best[kind, node] = max(best.get((kind, node), 0.0), rate(volumes[node], kind))
    print("         cache    none   ratio  C, no cache")
    for kind in COUNTS:
        on, off = best[kind, ON], best[kind, OFF]
        print(f"{kind:<6} {on:7.0f} {off:7.0f} {on / off:7.2f} {C_RATES[kind]:12}")


if __name__ == "__main__":
    main()
