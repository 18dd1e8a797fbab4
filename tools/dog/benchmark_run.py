"""`dog benchmark run`: what this cluster gives, on a volume made for it and removed afterwards."""

from __future__ import annotations

import json
import statistics
from typing import Any

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.workload import OBJECT_BYTES, Cell, Measured, Workload, parse_cell
from sheepdog.cluster.core.errors import UsageError
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import text
from sheepdog.tools.dog.values import parse_redundancy, positive

DEFAULT_CELLS = (
    "read:4k:1", "read:4k:16", "read:4k:64", "write:4k:1", "write:4k:16", "write:4k:64", "write:4k:16:flush32",
    "mixed:4k:16", "first:4k:16", "read:1M:4:seq", "write:1M:4:seq",
)  # fmt: skip
DEFAULT_MIB = 256  # more than a sheep keeps in memory by itself, little enough to be written in seconds
DEFAULT_SECONDS = 2  # of one run of one cell
DEFAULT_ROUNDS = 3
PERCENTILES = (50, 95, 99)


def run(context: Context) -> None:
    """A line for each kind of load: medians of the rounds, which take turns."""
    words = context.rest(0) or list(DEFAULT_CELLS)
    try:
        cells = [parse_cell(word) for word in words]
    except UsageError as error:
        raise Failure(str(error), 1) from None
    mebibytes = positive(context, "size", "number of MiB", DEFAULT_MIB)
    seconds = positive(context, "seconds", "number of seconds", DEFAULT_SECONDS)
    rounds = positive(context, "rounds", "number of rounds", DEFAULT_ROUNDS)
    copies, policy = parse_redundancy(context.value("copies")) if context.flag("copies") else (0, 0)
    context.nodes()
    try:
        workload = Workload((context.host, int(context.port)), -(-mebibytes * 2**20 // OBJECT_BYTES), copies, policy)
        try:
            results = [[workload.run(cell, seconds) for cell in cells] for _ in range(rounds)]
        finally:
            workload.close()
    except SheepError as error:
        raise Failure(f"a request failed: {text(error.result)}", 2) from error
    except OSError as error:
        raise Failure(f"a request failed: {error}", 2) from error
    rows = [summary(cell, list(runs)) for cell, runs in zip(cells, zip(*results, strict=True), strict=True)]
    if context.json:
        print(json.dumps({"rounds": rounds, "seconds": seconds, "cells": rows}, indent=2))
        return
    if not context.raw:
        print(f"{'':44}{'IOPS':>10}{'MB/s':>10}{'spread':>8}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}")
    for row in rows:
        print(table_line(row))


def summary(cell: Cell, runs: list[Measured]) -> dict[str, Any]:
    """Medians of several runs; `spread` is (highest - lowest) / median of the rates."""
    rates = [one.rate for one in runs]
    middle = statistics.median(rates)
    return {
        "cell": str(cell),
        "operation": cell.operation,
        "bytes": cell.size,
        "depth": cell.depth,
        "clients": cell.clients,
        "iops": round(middle, 1),
        "megabytes_per_second": round(middle * cell.size / 1e6, 1),
        "spread": round((max(rates) - min(rates)) / middle, 3),
        "latency_ms": {
            f"p{part}": round(1000 * statistics.median(one.percentile(part / 100) for one in runs), 3)
            for part in PERCENTILES
        },
    }


def table_line(row: dict[str, Any]) -> str:
    latency = row["latency_ms"]
    return (
        f"{row['cell']:44}{row['iops']:>10.0f}{row['megabytes_per_second']:>10.1f}{row['spread']:>8.0%}"
        f"{latency['p50']:>9.2f}{latency['p95']:>9.2f}{latency['p99']:>9.2f}"
    )
