"""Recovery, measured: one of four nodes that holds 1.5 GB dies, and comes back untouched; or misses some writes.

recovery    without clients, from the kill until all copies are where they belong; MB/s of what had to be moved
rejoin      of the node, untouched: from its joining until all is settled; bytes fetched
writes      another recovery: p99 of 4 KiB client writes (depth 1) while it goes on, against quiet times
resync      of a node that missed one write in a hundred; bytes fetched against bytes missed
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from tests.bench import administration
from tests.support import native
from tests.support.cluster import Cluster

from sheepdog.cluster.client.workload import VOLATILE, Cell, Workload

NODES = 4
VICTIM = 3
MIB = 1 << 20
OBJECT = 4 * MIB
VOLUME_BYTES = 2048 * MIB  # three copies on four nodes: 1.5 GB each
MISSED_SHARE = 100  # one block in so many is written while the node is away
BLOCK = 4096
WRITES = Cell("write", BLOCK, 1, VOLATILE)
SLICE_S = 0.25  # of the writer's load: so soon it looks whether it should end
QUIET_S = 5.0
LIMIT_S = 600.0
POLL_S = 0.05  # each look costs each node a millisecond, and this process some ...
SELDOM_S = 0.5  # ... which a client's latencies would show
Figures = dict[str, float | str]
C_RATES = "342-472"  # MB/s of C Sheepdog for the same, on a quiet machine of two cores


class Writer:
    """A client that writes 4 KiB at random places, one after the other; a process of its own, as clients are."""

    def __init__(self, cluster: Cluster) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_write, args=(cluster.port(0), there), daemon=True)
        self._process.start()
        self._here.recv()  # it has begun
        self._slices: list[tuple[float, float, list[float]]] = []

    def end(self) -> None:
        self._here.send(None)
        self._slices = self._here.recv()
        self._process.join(LIMIT_S)

    def latencies(self, begin: float, end: float) -> list[float]:
        """Of the writes between two times of time.monotonic, ascending; after `end`."""
        found = [values for first, last, values in self._slices if last > begin and first < end]
        return sorted(itertools.chain.from_iterable(found))


def _write(port: int, parent: Connection) -> None:
    load = Workload(("127.0.0.1", port), 16)
    slices: list[tuple[float, float, list[float]]] = []
    parent.send(None)
    while not parent.poll():
        begin = time.monotonic()
        latencies = load.run(WRITES, SLICE_S).latencies
        slices.append((begin, time.monotonic(), list(latencies)))
    parent.send(slices)
    load.close()


def details(cluster: Cluster, node: int) -> dict[str, object]:
    """NODE_DETAILS of a node; empty while it does not answer."""
    try:
        return dict(json.loads(native.ask(cluster.socket(node), 0xE0, 1 << 18).payload or b"{}"))
    except OSError:
        return {}


def restored_bytes(cluster: Cluster) -> int:
    found = [details(cluster, node).get("restored_bytes", 0) for node in cluster.running_nodes()]
    return sum(int(str(value)) for value in found)


def wait(what: Callable[[], bool], begin: float, poll_s: float = POLL_S) -> float:
    """Seconds from `begin` until it is so."""
    while not what():
        if time.monotonic() - begin > LIMIT_S:
            raise TimeoutError("recovery takes too long")
        time.sleep(poll_s)
    return time.monotonic() - begin


def settled(cluster: Cluster, members: int) -> bool:
    """All members are in one epoch, and nobody has anything to recover."""
    found = [details(cluster, node) for node in cluster.running_nodes()]
    return (
        len(found) == members
        and len({one.get("epoch") for one in found}) == 1
        and native.member_count(cluster.socket(0)) == members
        and not any(one.get("peering", True) or one.get("unfinished", True) for one in found)
    )


def held_bytes(cluster: Cluster, node: int) -> int:
    return sum(path.stat().st_blocks * 512 for path in cluster.objects(node).values())


def joined(cluster: Cluster, epoch: int) -> bool:
    return all(int(str(details(cluster, node).get("epoch", 0))) > epoch for node in (0, VICTIM))


def come_back(cluster: Cluster) -> tuple[float, float]:
    """Starts the victim: (seconds from the start, seconds from the new epoch) until all is settled."""
    epoch = int(str(details(cluster, 0)["epoch"]))
    begin = time.monotonic()
    cluster.start(VICTIM)
    since_start = wait(lambda: joined(cluster, epoch), begin)
    total = wait(lambda: settled(cluster, NODES), begin)
    return total, total - since_start


def p99_ms(ascending: list[float]) -> float:
    return 1000 * ascending[int(0.99 * len(ascending))]


def recover(cluster: Cluster, poll_s: float = POLL_S) -> tuple[str, Figures]:
    """Kills the victim, and waits until the others have all copies: how fast that was, in words and figures."""
    begin = time.monotonic()
    cluster.kill(VICTIM)
    cpu, before = administration.cpu_seconds(cluster), restored_bytes(cluster)
    seconds = wait(lambda: settled(cluster, NODES - 1), begin, poll_s)
    cpu, moved = administration.cpu_seconds(cluster) - cpu, restored_bytes(cluster) - before
    rate, cost = moved / seconds / 1e6, 1000 * cpu / (moved / 1e6)
    words = f"{moved / 1e6:.0f} MB in {seconds:.2f} s, {rate:.0f} MB/s; {cost:.2f} ms CPU of all daemons per MB"
    return words, {"bytes": moved, "seconds": seconds, "megabytes_per_second": rate, "cpu_ms_per_megabyte": cost}


def beside_a_client(cluster: Cluster) -> Figures:
    """What recovery costs a client, and a client recovery."""
    writer = Writer(cluster)
    start = time.monotonic()
    time.sleep(QUIET_S)
    begin = time.monotonic()
    recovered, figures = recover(cluster, SELDOM_S)
    end = time.monotonic()
    writer.end()
    quiet, during = writer.latencies(start, begin - SLICE_S), writer.latencies(begin, end)
    ratio = p99_ms(during) / p99_ms(quiet)
    print(f"recovery beside a client that writes: {recovered}")
    print(f"p99 of writes: quiet {p99_ms(quiet):.2f} ms, during recovery {p99_ms(during):.2f} ms: {ratio:.1f} times")
    medians = [1000 * one[len(one) // 2] for one in (quiet, during)]
    print(f"  medians {medians[0]:.2f}, {medians[1]:.2f} ms; {len(quiet)}, {len(during)} writes;", end=" ")
    print(f"the longest {1000 * during[-1]:.0f} ms")
    return {**figures, "p99_ms_quiet": p99_ms(quiet), "p99_ms": p99_ms(during), "longest_ms": 1000 * during[-1]}


def measure(cluster: Cluster) -> list[Figures]:
    """Prints and returns the figures; the cluster has NODES nodes and is formatted with three copies."""
    cluster.dog("vdi", "create", "bench", str(VOLUME_BYTES))
    for start in range(0, VOLUME_BYTES, 256 * MIB):
        data = os.urandom(256 * MIB)
        cluster.dog("vdi", "write", "bench", str(start), str(len(data)), stdin=data, seconds=LIMIT_S)
    held = held_bytes(cluster, VICTIM)
    words, figures = recover(cluster)
    rows: list[Figures] = [{"name": "recovery", **figures}]
    print(f"recovery of {held / 1e6:.0f} MB: {words} (C: {C_RATES} MB/s)")

    before = restored_bytes(cluster)
    total, own = come_back(cluster)
    fetched = restored_bytes(cluster) - before
    print(f"rejoin, {held / 1e6:.0f} MB, written to since by nobody: {own:.2f} s after its epoch began", end=" ")
    print(f"({total:.2f} s after its start); {fetched / 1e6:.1f} MB fetched")
    rows.append({"name": "rejoin", "seconds": own, "seconds_from_start": total, "fetched_bytes": fetched})

    rows.append({"name": "recovery beside a client that writes", **beside_a_client(cluster)})

    missed = miss_writes(cluster)
    before = restored_bytes(cluster)
    total, own = come_back(cluster)
    fetched = restored_bytes(cluster) - before
    print(f"resync after {missed / 1e6:.1f} MB were written (1 %): {own:.2f} s after its epoch began,", end=" ")
    print(f"{fetched / 1e6:.1f} MB fetched: {fetched / (missed * 3 / 4):.2f} of its share")
    rows.append({"name": "resync", "seconds": own, "missed_bytes": missed, "fetched_bytes": fetched})
    return rows


def miss_writes(cluster: Cluster) -> int:
    """Writes one block in MISSED_SHARE, at random; bytes."""
    from sheepdog.cluster.client.blocking import BlockingVolume

    numbers = random.Random(1)
    volume = BlockingVolume.open(("127.0.0.1", cluster.port(0)), "bench")
    count = VOLUME_BYTES // BLOCK // MISSED_SHARE
    for block in sorted(numbers.sample(range(VOLUME_BYTES // BLOCK), count)):
        volume.write(block * BLOCK, numbers.randbytes(BLOCK))
    volume.close()
    return count * BLOCK
