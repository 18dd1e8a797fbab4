"""The whole matrix: kinds of load x kinds of redundancy x doors (x another implementation), in one run.

    make bench-matrix [PEER_SHEEP=/path/to/bin] [ARGS='--rounds 5 --only write --doors native,sheepfs --syscalls']

What is compared takes turns (A B A B), and figures are medians with their spread, since machines drift: compare within
one run only. `PEER_SHEEP` is a directory with the `sheep` and `dog` of any other server of the native protocol; it gets
the same loads from the same generator (cluster/client/workload.py). The other doors are driven by fio.

Writes bench-results/matrix.json (--results) and, with --charts, charts of it (tests/bench/results.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree, which
from typing import Any, Protocol

from tests.bench import results
from tests.bench.counting import cpu_seconds, system_calls
from tests.bench.fio import FioLoad
from tests.support.cluster import Cluster, started
from tests.support.mounts import SheepFs
from tests.support.nbd import NbdServer
from tests.support.processes import CommandFailed, having_argument, resident_bytes

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.workload import FRESH_OBJECTS, OBJECT_BYTES, Cell, Workload, parse_cell
from sheepdog.tools.dog.values import parse_redundancy

OBJECTS = 32  # of 4 MiB written in each volume before the clock runs
DOORS = ("native", "sheepfs", "nbd")
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


class Measured(Protocol):
    """What a run gives."""

    @property
    def operations(self) -> int: ...

    @property
    def rate(self) -> float: ...

    def percentile(self, part: float) -> float: ...


class Load(Protocol):
    """A volume behind a door."""

    def run(self, cell: Cell, seconds: float) -> Measured: ...


@dataclass(slots=True)
class Variant:
    """One of the things compared: a volume with its redundancy, behind a door."""

    name: str
    cluster: Cluster
    load: Load
    door: int = 0  # pid of the door's own process
    runs: dict[Cell, list[tuple[Measured, float]]] = field(default_factory=dict)  # with CPU seconds of all daemons
    calls: dict[Cell, float] = field(default_factory=dict)  # system calls per operation
    refused: dict[Cell, str] = field(default_factory=dict)

    def pids(self) -> list[int]:
        daemons = [pid for node in range(self.cluster.count) for pid in self.cluster.pids(node)]
        return [*daemons, self.door] if self.door else daemons

    def once(self, cell: Cell, seconds: float) -> None:
        pids = self.pids()
        before = cpu_seconds(pids)
        try:
            measured = self.load.run(cell, seconds)
        except (SheepError, OSError, CommandFailed) as error:
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


class Fronts:
    """The doors of one cluster beside the native one."""

    def __init__(self, cluster: Cluster, directory: Path, stack: ExitStack, doors: Sequence[str], objects: int) -> None:
        self._cluster = cluster
        self._objects = objects
        self._nbd: NbdServer | None = None
        self._mount: SheepFs | None = None
        if "nbd" in doors:
            self._nbd = NbdServer(cluster, directory)
            stack.callback(self._nbd.close)
        if "sheepfs" in doors:
            self._mount = SheepFs(cluster, directory / "mount")
            stack.callback(self._mount.close)

    def variants(self, redundancy: str) -> Iterator[Variant]:
        """A volume of its own for each door; `redundancy` as `dog vdi create -c` takes it."""
        for door in ("sheepfs", "nbd"):
            name = f"{door}-{redundancy.replace(':', '-')}"
            title = f"{door}, {shown(redundancy)}"
            if door == "nbd" and self._nbd is not None:
                self._fill(name, redundancy)
                load = FioLoad(self._nbd.uri(name), self._objects)
                yield Variant(title, self._cluster, load, self._nbd.process.pid)
            elif door == "sheepfs" and self._mount is not None:
                self._fill(name, redundancy)
                (pid,) = having_argument(str(self._mount.place))
                yield Variant(title, self._cluster, FioLoad(self._mount.volume(name), self._objects), pid)

    def _fill(self, name: str, redundancy: str) -> None:
        size = (self._objects + FRESH_OBJECTS) * OBJECT_BYTES
        self._cluster.dog("vdi", "create", "-c", redundancy, name, str(size))
        content = os.urandom(self._objects * OBJECT_BYTES)
        self._cluster.dog("vdi", "write", name, "0", str(len(content)), stdin=content, seconds=300)


def shown(redundancy: str) -> str:
    return redundancy if ":" in redundancy else f"{redundancy} {'copy' if redundancy == '1' else 'copies'}"


def variants(
    directory: Path, stack: ExitStack, peer: str | None, redundancies: Sequence[str], doors: Sequence[str], objects: int
) -> list[Variant]:
    """Volumes on clusters that run: three nodes for copies, six for 4:2."""

    def cluster(name: str, count: int, **more: Any) -> Cluster:
        (directory / name).mkdir()
        made = Cluster(count, directory / name, options=(), **more)
        stack.callback(made.close)
        started(made).format("-c", "3")
        return made

    def native(of: Cluster, copies: int, policy: int = 0) -> Workload:
        # By TCP for everybody: at 127.0.0.1 our own sheep would be reached without.
        return Workload(("127.0.0.2", of.port(0)), objects, copies, policy)

    found: list[Variant] = []
    for name, count, mine in (
        ("own", 3, [word for word in redundancies if ":" not in word]),
        ("coded", 6, [word for word in redundancies if ":" in word]),
    ):
        if not mine:
            continue
        own = cluster(name, count)
        fronts = Fronts(own, directory / name, stack, doors, objects)
        for redundancy in mine:
            if "native" in doors:
                found.append(Variant(shown(redundancy), own, native(own, *parse_redundancy(redundancy))))
            found += fronts.variants(redundancy)
    if peer:
        theirs = cluster("peer", 3, binaries=Path(peer))
        found.append(Variant("peer, 3 copies", theirs, native(theirs, 3)))
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


def needed(doors: Sequence[str]) -> list[str]:
    """Programs that must be there."""
    return [*(["fio"] if {"sheepfs", "nbd"} & set(doors) else []), *(["nbdkit"] if "nbd" in doors else [])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-matrix ARGS='...'", description="Measure everything in one run.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run of one cell")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--cell", action="append", default=[], help="this cell (as dog benchmark run), not the matrix")
    parser.add_argument("--redundancy", default="3,1,4:2", help="what dog vdi create -c takes, each D:P on six nodes")
    parser.add_argument("--doors", default=",".join(DOORS), help="of native, sheepfs and nbd")
    parser.add_argument("--syscalls", action="store_true", help="count system calls with strace, in a run of their own")
    parser.add_argument("--objects", type=int, default=OBJECTS, help="written in each volume before the clock runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--charts", type=Path, help="a directory for charts (SVG)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended in this case too
    cells = [parse_cell(word) for word in options.cell] or [cell for cell in matrix() if options.only in str(cell)]
    with contextlib.suppress(PermissionError):
        os.nice(PRIORITY)
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
    with ExitStack() as stack:
        stack.callback(rmtree, directory, ignore_errors=True)
        redundancies, doors = options.redundancy.split(","), options.doors.split(",")
        if missing := [name for name in needed(doors) if which(name) is None]:
            parser.error(f"these doors need {', '.join(missing)}: install them, or choose others with --doors")
        compared = variants(directory, stack, os.environ.get("PEER_SHEEP"), redundancies, doors, options.objects)
        before = results.machine()
        for cell in cells:
            for _ in range(options.rounds):
                for variant in compared:
                    variant.once(cell, options.seconds)
            for variant in compared:
                if options.syscalls and which("strace") and cell not in variant.refused:
                    calls = system_calls(variant.pids(), partial(variant.load.run, cell, options.seconds))
                    variant.calls[cell] = round(calls, 2)
        rows = report(compared, cells)
        memory = {variant.name: max(map(resident_bytes, variant.pids())) >> 20 for variant in compared}
        print(f"\nlargest daemon afterwards, MiB: {memory}; load {before['load'][0]:.1f} -> {os.getloadavg()[0]:.1f}")
    content = {"machine": before, "command": results.command("matrix"), "memory_mib": memory, "rows": rows}
    results.save(options.results, content)
    if options.charts:
        results.charts(options.results, options.charts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
