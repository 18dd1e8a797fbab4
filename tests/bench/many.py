"""What an operation costs among many: volumes of the cluster, objects on a node, clients of one sheep.

    python -m tests.bench.many [--volumes N] [--objects N] [--clients N] [--seconds S] [--rounds N] [--charts DIR]

One node, one copy, -n, so that nothing else of the cluster is in the figures. Each table grows tenfold to the number
asked for (0 leaves it out). The steady figure is the server's CPU time for an operation; rates are as good as the
machine is quiet. A million objects take about 16 GB of disk and some minutes to be made.

Writes bench-results/many.json (--results) and, with --charts, charts of it (tests/bench/results.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from typing import Any

from tests.bench import results
from tests.bench.administration import settle
from tests.bench.counting import cpu_seconds
from tests.support.cluster import Cluster, started
from tests.support.processes import resident_bytes

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.workload import OBJECT_BYTES, Cell, Workload, parse_cell
from sheepdog.cluster.wire.opcodes import Opcode

READ, WRITE, MAKE = parse_cell("read:4k:16"), parse_cell("write:4k:16:volatile"), parse_cell("first:4k:64:volatile")
IDS = 65_536  # of requests: many more than are under way
MAKING_S = 3600.0  # ends when the objects are there, or synced, or found again
RESULTS = Path("bench-results/many.json")
CLIENT_CELLS = ("read:4k:1", "write:4k:1:volatile")


class Spread(Workload):
    """Its reads and writes go to the first 4 KiB of objects chosen among all that `grow` has made.

    Only what `run` needs is used after the sheep was started again: each run connects anew.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, 1, 1)
        self.made = 0

    def grow(self, objects: int) -> None:
        self._until = objects
        self.run(MAKE, MAKING_S)
        self.made = objects

    def _requests(self, cell: Cell, client: int) -> Iterator[bytes]:
        payload = random.Random(client).randbytes(cell.size)
        if cell.operation == "first":
            return self._creations(cell, payload)
        opcode = Opcode.READ_OBJ if cell.operation == "read" else Opcode.WRITE_OBJ
        return self._anywhere(cell, opcode, payload if cell.writes else b"")

    def _anywhere(self, cell: Cell, opcode: Opcode, payload: bytes) -> Iterator[bytes]:
        """Not prepared: a cycle of some thousand objects would find all their files open."""
        numbers = random.Random(cell.size)
        for number in itertools.count():
            index = numbers.randrange(self.made)
            yield self._request(opcode, index, 0, cell.size, number % IDS, cell.flush_every) + payload

    def _creations(self, cell: Cell, payload: bytes) -> Iterator[bytes]:
        opcode = Opcode.CREATE_AND_WRITE_OBJ
        for index in range(self.made, self._until):
            yield self._request(opcode, index, 0, cell.size, index % IDS, cell.flush_every) + payload


class Table:
    """Printed as it grows; `columns` and `rows` are what remains of it."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[float, ...]] = []
        print()
        _line(columns)
        _line(["---:"] * len(columns))

    def add(self, *values: float) -> None:
        rounded = tuple(round(value, 0 if value >= 10 else 2) for value in values)
        self.rows.append(rounded)
        _line([f"{value:,g}" if value < 1e6 else f"{value:,.0f}" for value in rounded])

    def content(self) -> dict[str, Any]:
        return {"columns": self.columns, "rows": self.rows}


def _line(cells: Iterable[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


class Bench:
    """One sheep."""

    def __init__(self, stack: ExitStack, seconds: float, rounds: int) -> None:
        directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
        stack.callback(rmtree, directory, ignore_errors=True)
        self.cluster = Cluster(1, directory)
        stack.callback(self.cluster.close)
        started(self.cluster).format("-c", "1")
        self.address = ("127.0.0.1", self.cluster.port(0))
        self._seconds = seconds
        self._rounds = rounds

    @property
    def memory_mib(self) -> int:
        return max(map(resident_bytes, self.cluster.pids(0))) >> 20

    def cost(self, load: Workload, cell: Cell) -> tuple[float, float, float]:
        """Operations per second, CPU microseconds for one, 99th percentile in ms: medians."""
        pids = self.cluster.pids(0)
        rows = []
        for _ in range(self._rounds):
            before = cpu_seconds(pids)
            one = load.run(cell, self._seconds)
            used = cpu_seconds(pids) - before
            rows.append((one.rate, 1e6 * used / one.operations, 1000 * one.percentile(0.99)))
        rate, cpu, late = (statistics.median(column) for column in zip(*rows, strict=True))
        return rate, cpu, late

    def volumes(self, most: int) -> Table:
        table = Table("volumes", "read, us", "write, us", "memory, MiB")
        load = Workload(self.address, 4, 1)
        connection = Connection(self.address)
        made = 0
        for number in tens(most):
            for other in range(made, number):
                admin.new_volume(connection, b"other%d" % other, OBJECT_BYTES)
            made = number
            table.add(number, *(self.cost(load, cell)[1] for cell in (READ, WRITE)), self.memory_mib)
        connection.close()
        load.close()
        return table

    def objects(self, most: int) -> Table:
        columns = ("made per second", "read, us", "write, us", "memory, MiB", "stop, s", "start, s", "memory then, MiB")
        table = Table("objects", *columns)
        load = Spread(self.address)
        for number in tens(most):
            begin, before = time.monotonic(), load.made
            load.grow(number)
            made = (number - before) / (time.monotonic() - begin)
            settle(self.cluster)  # what is left of the making would be charged to the reads
            costs = [self.cost(load, cell)[1] for cell in (READ, WRITE)]
            memory = self.memory_mib
            begin = time.monotonic()
            self.cluster.dog("cluster", "shutdown")
            self.cluster.wait_stopped(MAKING_S)
            stopped = time.monotonic()
            self.cluster.start(0)
            self.cluster.wait_members(1, seconds=MAKING_S)
            started_s = time.monotonic() - stopped
            table.add(number, made, *costs, memory, stopped - begin, started_s, self.memory_mib)
        return table

    def clients(self, most: int) -> Table:
        columns = [f"4 KiB {word}: {what}" for word in ("read", "write") for what in ("IOPS", "us", "p99 ms")]
        table = Table("clients", *columns, "memory, MiB")
        load = Workload(self.address, 4, 1)
        for number in tens(most):
            figures: list[float] = []
            for word in CLIENT_CELLS:
                figures += self.cost(load, parse_cell(f"{word}:x{number}"))
            table.add(number, *figures, self.memory_mib)
        load.close()
        return table


def tens(most: int) -> list[int]:
    """1, 10, 100 ... and `most`."""
    return [10**power for power in range(12) if 10**power < most] + [most]


def main() -> int:
    parser = argparse.ArgumentParser(prog="many", description="Measure what an operation costs among many.")
    parser.add_argument("--volumes", type=int, default=1000)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--charts", type=Path, help="a directory for charts (SVG)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended in this case too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * options.clients + 100)), hard))
    about = results.machine()
    print(json.dumps(about))
    tables = []
    parts = (("volumes", options.volumes), ("clients", options.clients), ("objects", options.objects))
    for name, most in parts:
        if most:
            with ExitStack() as stack:
                tables.append(getattr(Bench(stack, options.seconds, options.rounds), name)(most).content())
    results.save(options.results, {"machine": about, "command": results.command("many"), "tables": tables})
    if options.charts:
        results.charts(options.results, options.charts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
