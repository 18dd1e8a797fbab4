"""`make bench`: three nodes, three copies, QEMU 5.2's `qemu-img bench` as the client; C Sheepdog's figures beside it.

With `--coded`: six nodes, 4:2, without syncs, and the same cluster's own three copies beside it.

Prints for each workload operations (or bytes) per second and the CPU time of all daemons per operation: medians of
several runs. The second figure is the one to compare: the first drifts with whatever else the machine does. `client` is
what of one processor the client took, which has one thread: near 100 % it is the limit.

With `--recovery`: four nodes, one goes and comes back; see tests/bench/recovery.py.
With `--administration`: what `dog` commands cost, with up to a thousand volumes and snapshots.

The same figures go to bench-results/NAME.json (--results), NAME being volatile, durable, coded and so on.

    python -m tests.bench.run [--durable | --coded | --recovery | --administration] [--runs N] [--seconds S]
                              [--only TEXT] [--no-load] [--results FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from tests.bench import administration, recovery, results
from tests.bench.counting import cpu_seconds
from tests.support.cluster import Cluster, started
from tests.support.processes import run

from sheepdog.cluster.client import workload as generator

NODES = 3
CODED_NODES = 6
KIB, MIB = 1 << 10, 1 << 20
VOLUME_BYTES = 256 * MIB
OBJECT_BYTES = 4 * MIB
OWN_CELLS = ((4 * KIB, 1), (4 * KIB, 16), (4 * KIB, 64), (64 * KIB, 16), (MIB, 4))  # (bytes, depth)
FLUSH_EVERY = 32  # writes
RESULTS = Path("bench-results")
FIRST_COUNT = 64  # requests of the run that finds out how many fill the wanted time
QEMU_IMG = Path(os.environ.get("QEMU52") or Path.home() / ".cache/qemu-5.2-sheepdog") / "bin/qemu-img"


@dataclass(frozen=True, slots=True)
class Workload:
    """One row. `nosync`, `durable`: C Sheepdog on two cores, as (operations or MB per second, CPU ms)."""

    name: str
    size: int
    depth: int
    write: bool
    nosync: tuple[float, float] | None
    durable: tuple[float, float] | None
    fresh: bool = False  # each write is the first of its object
    flush_every: int = 0  # as cache=writeback: so many writes, then what a guest's flush asks for; 0: cache=none
    drain: bool = True  # nothing else is under way while it flushes

    @property
    def in_megabytes(self) -> bool:
        return self.size >= MIB


WORKLOADS = (
    Workload("4k read depth 1", 4 * KIB, 1, False, (4267, 0.13), (2613, 0.18)),
    Workload("4k read depth 16", 4 * KIB, 16, False, (14707, 0.07), (11726, 0.06)),
    Workload("4k write depth 1", 4 * KIB, 1, True, (2529, 0.44), (1639, 0.58)),
    Workload("4k write depth 16", 4 * KIB, 16, True, (4820, 0.34), (3269, 0.49)),
    # C's durable writes were measured at depth 16 only; its volatile ones are no faster at 64.
    Workload("4k write depth 64", 4 * KIB, 64, True, (4669, 0.35), (3269, 0.49)),
    # C refuses a flush: only its default, where every write waits for the disk, promises as much.
    Workload("4k write depth 16, flush each 32", 4 * KIB, 16, True, None, (3269, 0.49), flush_every=FLUSH_EVERY),
    # As a guest does it: its kernel sends on while a flush is under way. `qemu-img` alone waits for all before each.
    Workload(
        "4k write depth 16, flush beside", 4 * KIB, 16, True, None, (3269, 0.49), flush_every=FLUSH_EVERY, drain=False
    ),
    Workload(
        "4k write depth 32, flush beside", 4 * KIB, 32, True, None, (3269, 0.49), flush_every=FLUSH_EVERY, drain=False
    ),
    Workload("64k write depth 16", 64 * KIB, 16, True, (2797, 0.58), (2130, 0.74)),
    Workload("1M read depth 8", MIB, 8, False, (1324, 0.0), (882, 0.0)),
    Workload("1M write depth 8", MIB, 8, True, (362, 0.0), (224, 0.0)),
    Workload("4M read depth 4", 4 * MIB, 4, False, (1753, 0.0), (1086, 0.0)),
    Workload("4M write depth 4", 4 * MIB, 4, True, (442, 0.0), (269, 0.0)),
    Workload("first 4k write of an object, depth 1", 4 * KIB, 1, True, (831, 0.0), (93, 0.0), fresh=True),
    Workload("first 4k write of an object, depth 16", 4 * KIB, 16, True, (1362, 0.0), (283, 0.0), fresh=True),
)


CODED = {  # C Sheepdog with 4:2 on six nodes
    "4k read depth 1": (2235, 0.54),
    "4k read depth 16": (3004, 0.51),
    "4k write depth 1": (1502, 0.84),
    "4k write depth 16": (2462, 0.70),
    "64k write depth 16": (1524, 1.00),
    "1M read depth 8": (595, 0.0),
    "1M write depth 8": (442, 0.0),
    "4M read depth 4": (358, 0.0),
    "4M write depth 4": (289, 0.0),
    "first 4k write of an object, depth 1": (132, 0.0),
    "first 4k write of an object, depth 16": (246, 0.0),
}


@dataclass(frozen=True, slots=True)
class Result:
    seconds: float
    cpu_seconds: float  # of all daemons
    client_seconds: float  # of the client, which has one thread: where they are all of `seconds`, it is the limit
    count: int


class Measured(NamedTuple):
    rate: float  # operations per second
    cpu_ms: float  # of all daemons, for an operation
    client: float  # how much of a processor the client took


class Bench:
    """A cluster with a written volume, and the measuring of one run of a client against it."""

    def __init__(self, cluster: Cluster, name: str = "bench", redundancy: str = "3") -> None:
        self.cluster = cluster
        self.name = name
        self.redundancy = redundancy
        self.fresh = 0
        cluster.dog("vdi", "create", "-c", redundancy, name, str(VOLUME_BYTES))
        cluster.dog("vdi", "write", name, "0", str(VOLUME_BYTES), stdin=os.urandom(VOLUME_BYTES), seconds=300)

    def cpu_seconds(self) -> float:
        """User and system time of all daemons so far."""
        return administration.cpu_seconds(self.cluster)

    def once(self, work: Workload, count: int) -> Result:
        name = self.name
        # QEMU's driver holds a request back while another is under way in the same object: each takes the next object.
        step = OBJECT_BYTES + work.size % OBJECT_BYTES
        if work.fresh:
            self.fresh += 1
            name, step = f"{self.name}{self.fresh}", OBJECT_BYTES
            self.cluster.dog("vdi", "create", "-c", self.redundancy, name, str(count * step))
        before, own_before = self.cpu_seconds(), os.times()
        output = run(
            [
                QEMU_IMG, "bench", "-f", "raw", "-t", "writeback" if work.flush_every else "none",
                "-c", str(count), "-d", str(work.depth), "-s", str(work.size), "-S", str(step),
                *(["-w", "--pattern", "90"] if work.write else []),
                *([f"--flush-interval={work.flush_every}"] if work.flush_every else []),
                *([] if work.drain else ["--no-drain"]),
                f"sheepdog://127.0.0.1:{self.cluster.port(0)}/{name}",
            ],
            seconds=300,
        ).stdout.decode()  # fmt: skip
        seconds = float(output.split("Run completed in ")[1].split()[0])
        own = os.times()
        client = own.children_user + own.children_system - own_before.children_user - own_before.children_system
        # A fresh volume stays: ext4 looks for long past the inodes of files that were deleted a moment ago.
        return Result(seconds, self.cpu_seconds() - before, client, count)

    def measure(self, work: Workload, runs: int, seconds: float) -> Measured:
        """Medians."""
        first = self.once(work, FIRST_COUNT)
        count = max(FIRST_COUNT, int(FIRST_COUNT * seconds / max(first.seconds, 0.001)))
        if work.fresh:
            count = min(count, 2000)
        results = [self.once(work, count) for _ in range(runs)]
        rate = statistics.median(result.count / result.seconds for result in results)
        cpu_ms = statistics.median(1000 * result.cpu_seconds / result.count for result in results)
        return Measured(rate, cpu_ms, statistics.median(result.client_seconds / result.seconds for result in results))


def row(work: Workload, measured: Measured, peer: tuple[float, float] | None) -> str:
    rate, cpu_ms, client = measured
    speed = rate * work.size / 1e6 if work.in_megabytes else rate
    unit = "MB/s" if work.in_megabytes else "IOPS"
    peer_speed = f"{peer[0]:>8.0f}" if peer else f"{'-':>8}"
    peer_cpu = f"{peer[1]:>8.2f}" if peer and peer[1] else f"{'-':>8}"
    ratio = f"{speed / peer[0]:>7.2f}x" if peer else f"{'-':>8}"
    return f"{work.name:38}{speed:>10.0f} {unit}{cpu_ms:>9.3f}{client:>8.0%}   {peer_speed}{peer_cpu}{ratio}"


def figures(work: Workload, measured: Measured, peer: tuple[float, float] | None) -> dict[str, Any]:
    """One row for the JSON; `c_speed`: MB/s of large requests, operations per second of small ones."""
    rate, cpu_ms, client = measured
    found: dict[str, Any] = {"name": work.name, "iops": rate, "megabytes_per_second": rate * work.size / 1e6}
    found |= {"cpu_us": 1000 * cpu_ms, "client": client}
    return {**found, "c_speed": peer[0], "c_cpu_us": 1000 * peer[1]} if peer else found


def measure_copied(cluster: Cluster, runs: int, seconds: float, only: str, durable: bool) -> list[dict[str, Any]]:
    """Three copies against C's."""
    bench = Bench(cluster)
    mode = "every write durable" if durable else "-n: never durable"
    print(f"Three nodes, three copies, {mode}; qemu-img bench, medians of {runs} runs.\n")
    print(f"{'':38}{'this':>15}{'CPU ms':>9}{'client':>8}   {'C':>8}{'CPU ms':>8}{'ratio':>8}")
    rows = []
    for work in WORKLOADS:
        if only in work.name:
            measured, peer = bench.measure(work, runs, seconds), work.durable if durable else work.nosync
            print(row(work, measured, peer), flush=True)
            rows.append(figures(work, measured, peer))
    return rows


def measure_coded(cluster: Cluster, runs: int, seconds: float, only: str) -> list[dict[str, Any]]:
    """4:2 against C's 4:2 and against three copies on the same nodes."""
    benches = Bench(cluster, "coded", "4:2"), Bench(cluster, "copied", "3")
    print(f"Six nodes, never durable; qemu-img bench, medians of {runs} runs.\n")
    titles = f"{'':38}{'4:2':>15}{'CPU ms':>9}{'client':>8}   {'C 4:2':>8}{'CPU ms':>8}{'ratio':>8}"
    print(titles + f"{'3 copies':>10}{'CPU ms':>9}")
    rows = []
    for work in WORKLOADS:
        if only in work.name and work.name in CODED:
            measured, copied = [bench.measure(work, runs, seconds) for bench in benches]
            beside = {"copied_iops": copied.rate, "copied_cpu_us": 1000 * copied.cpu_ms}
            rows.append({**figures(work, measured, CODED[work.name]), **beside})
            own = copied.rate * work.size / 1e6 if work.in_megabytes else copied.rate
            print(row(work, measured, CODED[work.name]) + f"{own:>10.0f}{copied.cpu_ms:>9.3f}", flush=True)
    return rows


def measure_own_client(cluster: Cluster, durable: bool, seconds: float) -> list[dict[str, Any]]:
    """`dog benchmark run`'s generator."""
    print("\nThe same nodes under a client that costs less than QEMU's:\n", flush=True)
    rows = []
    pids = [pid for node in range(cluster.count) for pid in cluster.pids(node)]
    load = generator.Workload(("127.0.0.1", cluster.port(0)), VOLUME_BYTES >> 22)
    sync = generator.DURABLE if durable else generator.VOLATILE
    cells: list[generator.Cell] = []
    for size, depth in OWN_CELLS:
        cells += generator.Cell("write", size, depth, sync), generator.Cell("read", size, depth)
    if durable:
        cells.append(generator.Cell("write", 4 * KIB, 16, FLUSH_EVERY))
    for cell in cells:
        before = cpu_seconds(pids)
        measured = load.run(cell, seconds)
        cost = 1e6 * (cpu_seconds(pids) - before) / measured.operations
        speed = measured.rate * cell.size / 1e6
        print(f"{cell!s:38}{measured.rate:>10.0f} IOPS {speed:>9.1f} MB/s {cost:>9.1f} us CPU/op", flush=True)
        rows.append({"name": str(cell), "iops": measured.rate, "megabytes_per_second": speed, "cpu_us": cost})
    load.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench ARGS='...'", description="Measure three nodes with three copies.")
    parser.add_argument("--coded", action="store_true", help="six nodes and a volume of 4:2")
    parser.add_argument("--administration", action="store_true", help="the cost of dog commands")
    parser.add_argument("--recovery", action="store_true", help="four nodes, of which one goes and comes back")
    parser.add_argument("--durable", action="store_true", help="without -n: every write is durable when it is answered")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one run")
    parser.add_argument(
        "--only",
        default="",
        help="only workloads whose name contains this; `stream` or `commands` with --administration",
    )
    parser.add_argument("--no-load", action="store_true", help="leave out the own load generator")
    parser.add_argument("--results", type=Path, help="the JSON file")
    arguments = parser.parse_args()
    if not QEMU_IMG.exists() and not (arguments.administration or arguments.recovery):
        print(f"{QEMU_IMG} is missing: make qemu52 builds it", file=sys.stderr)
        return 1
    kinds = ("durable", "coded", "administration", "recovery")
    kind = next((kind for kind in kinds if getattr(arguments, kind)), "volatile")
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
    with ExitStack() as stack:
        stack.callback(rmtree, directory, ignore_errors=True)
        nodes = CODED_NODES if arguments.coded else recovery.NODES if arguments.recovery else NODES
        cluster = Cluster(nodes, directory, options=() if arguments.durable else ("-n",))
        stack.callback(cluster.close)
        started(cluster).format("-c", "3")
        about = results.machine()
        rows = measure(cluster, kind, arguments)
    content = {"machine": about, "command": results.command("run"), "rows": rows}
    results.save(arguments.results or RESULTS / f"{kind}.json", content)
    return 0


def measure(cluster: Cluster, kind: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints, and returns, the figures of one kind of run."""
    runs, seconds, only = arguments.runs, arguments.seconds, arguments.only
    if kind == "recovery":
        return recovery.measure(cluster)
    if kind == "administration":
        return administration.measure(cluster, only)
    if kind == "coded":
        return measure_coded(cluster, runs, seconds, only)
    rows = measure_copied(cluster, runs, seconds, only, arguments.durable)
    return rows if arguments.no_load else rows + measure_own_client(cluster, arguments.durable, seconds)


if __name__ == "__main__":
    sys.exit(main())
