"""The whole matrix: kinds of load x kinds of redundancy (x another implementation), in one run.

    make bench-matrix [PEER_SHEEP=/path/to/bin] [ARGS='--rounds 5 --only write --syscalls']

What is compared takes turns (A B A B), and figures are medians with their spread, since machines drift: compare within
one run only. `PEER_SHEEP` is a directory with the `sheep` and `dog` of any other server of the native protocol; it gets
the same loads from the same generator (cluster/client/workload.py).

Writes bench-results/matrix.json and, with --svg, a chart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree, which
from typing import Any

from tests.bench.chart import bars
from tests.bench.counting import cpu_seconds, resident_bytes, system_calls
from tests.support.cluster import Cluster, started

from sheepdog import COMPILED
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.workload import Cell, Measured, Workload, parse_cell

OBJECTS = 32  # of 4 MiB in each volume
RESULTS = Path("bench-results/matrix.json")
SYNCS = ("durable", "flush32", "volatile")
SIZES = ("4k", "64k", "1M", "4M")
DEPTHS = {"4k": (1, 16, 64), "64k": (1, 16), "1M": (1, 4), "4M": (1, 4)}
PRIORITY = -10  # nice value asked for: other work of the machine should not be measured


def matrix() -> Iterator[Cell]:
    """Every cell of the native door."""
    for size in SIZES:
        for depth in DEPTHS[size]:
            yield parse_cell(f"read:{size}:{depth}")
            for sync in SYNCS:
                yield parse_cell(f"write:{size}:{depth}:{sync}")
        yield parse_cell(f"read:{size}:{DEPTHS[size][-1]}:seq")
        yield parse_cell(f"write:{size}:{DEPTHS[size][-1]}:durable:seq")
    for depth in (1, 16):
        yield parse_cell(f"first:4k:{depth}:durable")
        yield parse_cell(f"first:4k:{depth}:volatile")
        yield parse_cell(f"mixed:4k:{depth}:durable")
    yield parse_cell("read:4k:4:x16")
    yield parse_cell("write:4k:4:durable:x16")


@dataclass(slots=True)
class Variant:
    """One of the things compared: a cluster and the redundancy of the volume on it."""

    name: str
    cluster: Cluster
    copies: int
    policy: int
    runs: dict[Cell, list[tuple[Measured, float]]] = field(default_factory=dict)  # with CPU seconds of all daemons
    calls: dict[Cell, float] = field(default_factory=dict)  # system calls per operation
    refused: dict[Cell, str] = field(default_factory=dict)

    def pids(self) -> list[int]:
        return [pid for node in range(self.cluster.count) for pid in self.cluster.pids(node)]

    def once(self, workload: Workload, cell: Cell, seconds: float) -> None:
        pids = self.pids()
        before = cpu_seconds(pids)
        try:
            measured = workload.run(cell, seconds)
        except (SheepError, OSError) as error:
            self.refused[cell] = str(error)
        else:
            self.runs.setdefault(cell, []).append((measured, cpu_seconds(pids) - before))

    def row(self, cell: Cell) -> dict[str, Any]:
        runs = self.runs.get(cell)
        if not runs:
            return {"variant": self.name, "cell": str(cell), "error": self.refused.get(cell, "not run")}
        rates = [one.rate for one, _ in runs]
        middle = statistics.median(rates)
        return {
            "variant": self.name,
            "cell": str(cell),
            "iops": round(middle, 1),
            "megabytes_per_second": round(middle * cell.size / 1e6, 2),
            "spread": round((max(rates) - min(rates)) / middle, 3),
            "cpu_us": round(statistics.median(1e6 * cpu / max(one.operations, 1) for one, cpu in runs), 1),
            "system_calls": self.calls.get(cell),
            "p50_ms": round(1000 * statistics.median(one.percentile(0.5) for one, _ in runs), 3),
            "p99_ms": round(1000 * statistics.median(one.percentile(0.99) for one, _ in runs), 3),
        }


def variants(directory: Path, stack: ExitStack, peer: str | None, coded: bool) -> list[Variant]:
    """Clusters that run, formatted."""

    def cluster(name: str, count: int, **more: Any) -> Cluster:
        (directory / name).mkdir()
        made = Cluster(count, directory / name, options=(), **more)
        stack.callback(made.close)
        started(made).format("-c", "3")
        return made

    own = cluster("own", 3)
    found = [Variant("3 copies", own, 3, 0), Variant("1 copy", own, 1, 0)]
    if coded:
        found.append(Variant("4:2", cluster("coded", 6), 6, 2 << 4 | 2))
    if peer:
        theirs = cluster("peer", 3, binaries=Path(peer))
        found.append(Variant("peer, 3 copies", theirs, 3, 0))
    return found


def report(compared: list[Variant], cells: list[Cell]) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        print(f"\n{cell}")
        for variant in compared:
            row = variant.row(cell)
            rows.append(row)
            if "error" in row:
                print(f"  {variant.name:16} {row['error']}")
                continue
            calls = f"{row['system_calls']:7.1f} calls" if row["system_calls"] is not None else ""
            latency = f"p50 {row['p50_ms']:.2f} p99 {row['p99_ms']:.2f} ms"
            print(
                f"  {variant.name:16}{row['iops']:>10,.0f} IOPS{row['megabytes_per_second']:>9.1f} MB/s"
                f" +-{row['spread']:4.0%}{row['cpu_us']:>9.1f} us CPU {calls}  {latency}"
            )
    return rows


def machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "compiled": COMPILED,
        "load": os.getloadavg(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-matrix ARGS='...'", description="Measure everything in one run.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run of one cell")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--cell", action="append", default=[], help="this cell (as dog benchmark run), not the matrix")
    parser.add_argument("--no-coded", action="store_true", help="leave out the six nodes with 4:2")
    parser.add_argument("--syscalls", action="store_true", help="count system calls with strace, in a run of their own")
    parser.add_argument("--svg", type=Path, help="write a chart of the CPU per operation here")
    options = parser.parse_args()
    cells = [parse_cell(word) for word in options.cell] or [cell for cell in matrix() if options.only in str(cell)]
    with contextlib.suppress(PermissionError):
        os.nice(PRIORITY)
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
    with ExitStack() as stack:
        stack.callback(rmtree, directory, ignore_errors=True)
        compared = variants(directory, stack, os.environ.get("PEER_SHEEP"), not options.no_coded)
        before = machine()
        workloads = []
        for variant in compared:
            address = ("127.0.0.1", variant.cluster.port(0))
            workloads.append(Workload(address, OBJECTS, variant.copies, variant.policy))
        for cell in cells:
            for _ in range(options.rounds):
                for variant, workload in zip(compared, workloads, strict=True):
                    variant.once(workload, cell, options.seconds)
            for variant, workload in zip(compared, workloads, strict=True):
                if options.syscalls and which("strace") and cell not in variant.refused:
                    calls = system_calls(variant.pids(), partial(workload.run, cell, options.seconds))
                    variant.calls[cell] = round(calls, 2)
        rows = report(compared, cells)
        memory = {variant.name: max(map(resident_bytes, variant.pids())) >> 20 for variant in compared}
        print(f"\nlargest daemon afterwards, MiB: {memory}; load {before['load'][0]:.1f} -> {os.getloadavg()[0]:.1f}")
    RESULTS.parent.mkdir(exist_ok=True)
    command = " ".join(["python -m tests.bench.matrix", *sys.argv[1:]])
    RESULTS.write_text(
        json.dumps({"machine": before, "command": command, "memory_mib": memory, "rows": rows}, indent=1) + "\n"
    )
    if options.svg:
        good = [row for row in rows if "error" not in row]
        options.svg.write_text(
            bars("CPU of all daemons per operation, us", [(r["cell"], r["variant"], r["cpu_us"]) for r in good])
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
