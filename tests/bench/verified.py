"""What it costs a client that every block read is verified: `.venv/bin/python -m tests.bench.verified [ROUNDS]`.

Two clusters in turns, three nodes and three copies each; the daemons of one have no hashes (a hook in a module that
Python imports when they start, which no daemon of a user has). Medians, and the spread of the ratios of the rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.bench.counting import cpu_seconds
from tests.support.cluster import Cluster, started

from sheepdog.cluster.client import workload as generator

ROUNDS = 7
SECONDS = 1.0
OBJECTS = 16
CELLS = tuple(generator.Cell("read", size, depth) for size, depth in ((4 << 10, 16), (64 << 10, 16), (1 << 20, 4)))
# `len` for a hash fits nothing that another sheep wrote, and what such a sheep reads is compared with nothing.
HOOK = """
import xxhash
xxhash.xxh3_64_intdigest = len
from sheepdog.cluster.host import trailer
trailer.bad_blocks = lambda data, entries, first: []
"""


class Side:
    """A cluster, and the load on it."""

    def __init__(self, stack: ExitStack, verifying: bool) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (directory / "sitecustomize.py").write_text("" if verifying else HOOK)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(directory)
        try:
            cluster = Cluster(3, directory, options=("-n",))
            stack.callback(cluster.close)
            started(cluster).format("-c", "3")
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before
        self._pids = [pid for node in range(3) for pid in cluster.pids(node)]
        self._load = generator.Workload(("127.0.0.1", cluster.port(0)), OBJECTS)
        stack.callback(self._load.close)
        self.rates: list[float] = []
        self.costs: list[float] = []  # CPU, microseconds for an operation

    def run(self, cell: generator.Cell) -> None:
        before = cpu_seconds(self._pids)
        measured = self._load.run(cell, SECONDS)
        self.rates.append(measured.rate)
        self.costs.append(1e6 * (cpu_seconds(self._pids) - before) / measured.operations)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with ExitStack() as stack:
        sides = Side(stack, True), Side(stack, False)
        for cell in CELLS:
            for side in sides:
                side.rates.clear()
                side.costs.clear()
                side.run(cell)  # opens files, fills caches
            for _ in range(rounds):
                for side in sides:
                    side.run(cell)
            on, off = sides
            ratios = sorted(one / other for one, other in zip(on.rates[1:], off.rates[1:], strict=True))
            print(
                f"{cell!s:24} {statistics.median(on.rates[1:]):8.0f} IOPS verified,"
                f" {statistics.median(off.rates[1:]):8.0f} not;"
                f" ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f});"
                f" CPU {min(on.costs[1:]):6.1f} and {min(off.costs[1:]):6.1f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
