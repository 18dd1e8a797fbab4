"""The cells of the matrix through the doors that are files and sockets: fio as the client of sheepfs and of NBD.

A cell means the same as for the native protocol (cluster/client/workload.py). *Durable* is O_DSYNC where the door is a
file, and a flush after each write through NBD, for which fio has nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import CommandFailed, run

from sheepdog.cluster.client.workload import DURABLE, FRESH_OBJECTS, OBJECT_BYTES, READ_SHARE, Cell

GRACE_S = 120.0  # what fio may need beside the time of the load itself


def fio_time(seconds: float) -> str:
    """As fio takes it: it cuts fractions of seconds off, and 0 is for ever, or until all of the file has been done."""
    return f"{1000 * seconds:.0f}ms"


@dataclass(frozen=True, slots=True)
class FioMeasured:
    """What one run gave."""

    operations: int
    rate: float  # operations per second
    _percentiles: dict[str, int]  # nanoseconds of "50.000000" and the like

    def percentile(self, part: float) -> float:
        """Seconds in which this part (one of those that fio reports) of the requests was answered."""
        return self._percentiles.get(f"{100 * part:.6f}", 0) / 1e9


class FioLoad:
    """A written volume of `objects` objects behind a door; its size must leave room for FRESH_OBJECTS more."""

    def __init__(self, target: Path | str, objects: int) -> None:
        """`target`: the path of a file or device, or an NBD URI."""
        self._uri = target if isinstance(target, str) else ""
        self._file = "" if isinstance(target, str) else str(target)
        self._objects = objects
        self._first = objects  # index of the next object that does not exist

    def run(self, cell: Cell, seconds: float) -> FioMeasured:
        """Drives the cell; CommandFailed."""
        words = self.command(cell, seconds)
        output = run(words, seconds=seconds + GRACE_S).stdout
        (job,) = json.loads(output[output.index(b"{") :])["jobs"]  # remarks of its engine come first
        sides = [job["read"], job["write"]]
        operations = sum(side["total_ios"] for side in sides)
        if not operations:
            raise CommandFailed(f"{' '.join(words)}: no request was answered")
        if cell.operation == "first":
            self._first += operations + cell.depth * cell.clients
        most = max(sides, key=lambda side: int(side["total_ios"]))
        return FioMeasured(operations, sum(side["iops"] for side in sides), most["clat_ns"]["percentile"])

    def command(self, cell: Cell, seconds: float) -> list[str]:
        """What starts fio for such a run."""
        return [
            "fio", "--name=cell", "--output-format=json", f"--bs={cell.size}", f"--iodepth={cell.depth}",
            f"--numjobs={cell.clients}", "--group_reporting", "--time_based", f"--runtime={fio_time(seconds)}",
            "--thread", *self._engine(cell), *self._pattern(cell),
        ]  # fmt: skip

    def _engine(self, cell: Cell) -> list[str]:
        if self._uri:
            durable = ["--fsync=1"]
            words = ["--ioengine=nbd", f"--uri={self._uri}"]
        else:
            durable = ["--sync=dsync"]
            words = ["--ioengine=libaio", f"--filename={self._file}", "--direct=1"]
        if not cell.writes or not cell.flush_every:
            return words
        return words + (durable if cell.flush_every == DURABLE else [f"--fsync={cell.flush_every}"])

    def _pattern(self, cell: Cell) -> list[str]:
        whole = f"--size={self._objects * OBJECT_BYTES}"
        if cell.operation == "first":
            left = self._objects + FRESH_OBJECTS - self._first
            return [
                f"--rw=write:{OBJECT_BYTES - cell.size}", f"--offset={self._first * OBJECT_BYTES}",
                f"--size={left * OBJECT_BYTES}",
            ]  # fmt: skip
        if cell.operation == "mixed":
            return ["--rw=randrw", f"--rwmixread={100 * READ_SHARE:.0f}", "--norandommap", whole]
        if cell.sequential:
            return [f"--rw={cell.operation}", whole]
        return [f"--rw=rand{cell.operation}", "--norandommap", whole]
