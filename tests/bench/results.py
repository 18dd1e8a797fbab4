"""What a benchmark leaves behind: a JSON file with the machine, its load and the command, and charts made of it.

python -m tests.bench.results FILE DIRECTORY    # the charts of a JSON file once more
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.chart import Bar, bars

from sheepdog import COMPILED
from sheepdog.compiled import trained

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class Chart(NamedTuple):
    """One file: which rows of a matrix, and which of their figures."""

    name: str
    title: str
    figure: str
    takes: Callable[[Row], bool]
    note: Callable[[Row], str]
    least: int = 1  # variants; below that nothing is compared


def _spread(row: Row) -> str:
    return f"\u00b1{row['spread'] / 2:.0%}"


def _door(row: Row) -> str:
    """native, sheepfs, nbd or peer."""
    door, comma, _ = str(row["variant"]).partition(", ")
    return door if comma else "native"


def _direct(row: Row) -> bool:
    return _door(row) in ("native", "peer")


def _copied(row: Row) -> bool:
    """The same volume through each door."""
    return _door(row) != "peer" and str(row["variant"]).endswith("3 copies")


def _small(row: Row) -> bool:
    return str(row["cell"]).startswith("4k")


MATRIX_CHARTS = (
    Chart("native-4k", "Native protocol, 4 KiB: operations per second", "iops",
          lambda row: _direct(row) and _small(row), _spread),
    Chart("native-large", "Native protocol, 64 KiB to 4 MiB: MB per second", "megabytes_per_second",
          lambda row: _direct(row) and not _small(row), _spread),
    Chart("native-cpu", "Native protocol, 4 KiB: CPU microseconds of all daemons for an operation", "cpu_us",
          lambda row: _direct(row) and _small(row), lambda row: ""),
    Chart("native-latency", "Native protocol, 4 KiB: milliseconds, 99th percentile (median)", "p99_ms",
          lambda row: _direct(row) and _small(row), lambda row: f"({row['p50_ms']:.2f})"),
    Chart("doors-4k", "Three copies, 4 KiB, by door: operations per second", "iops",
          lambda row: _copied(row) and _small(row), _spread, 2),
    Chart("doors-large", "Three copies, 64 KiB to 4 MiB, by door: MB per second", "megabytes_per_second",
          lambda row: _copied(row) and not _small(row), _spread, 2),
    Chart("doors-cpu", "Three copies, 4 KiB, by door: CPU microseconds of daemons and door for an operation", "cpu_us",
          lambda row: _copied(row) and _small(row), lambda row: "", 2),
)  # fmt: skip


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "compiled": COMPILED,
        "trained": COMPILED and trained(),
        "load": os.getloadavg(),
    }


def command(module: str) -> str:
    return " ".join([f"python -m tests.bench.{module}", *sys.argv[1:]])


def save(path: Path, content: dict[str, Any]) -> None:
    """`content` holds what `machine()` said before the run and `command()`; what the load is now is added."""
    whole = json.dumps({**content, "load_after": os.getloadavg()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(whole, parse_float=_rounded), indent=1) + "\n")


def _rounded(number: str) -> float:
    """No figure here is truer than its fourth digit."""
    return float(f"{float(number):.4g}")


def charts(path: Path, directory: Path) -> list[Path]:
    """The charts of a file of the matrix or of `many`, by name; a chart without a row is left out."""
    content = json.loads(path.read_text())
    drawn = dict(_of_matrix(content["rows"]) if "rows" in content else _of_tables(content["tables"]))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, values) in drawn.items():
        written.append(directory / f"{name}.svg")
        written[-1].write_text(bars(title, values, _caption(content)))
    return written


def _of_matrix(rows: Sequence[Row]) -> Iterable[tuple[str, tuple[str, list[Bar]]]]:
    good = [row for row in rows if "variant" in row and "error" not in row]
    for chart in MATRIX_CHARTS:
        mine = [row for row in good if chart.takes(row)]
        if len({row["variant"] for row in mine}) >= chart.least:
            values = [Bar(row["cell"], row["variant"], row[chart.figure], chart.note(row)) for row in mine]
            yield chart.name, (chart.title, values)


def _of_tables(tables: Sequence[dict[str, Any]]) -> Iterable[tuple[str, tuple[str, list[Bar]]]]:
    """Tables of costs: the first column is what there are so many of, those in "us" are drawn."""
    for table in tables:
        what, *columns = table["columns"]
        values = [
            Bar(f"{row[0]:,} {what}", column, value)
            for row in table["rows"]
            for column, value in zip(columns, row[1:], strict=True)
            if column.endswith("us")
        ]
        yield f"many-{what}", (f"CPU microseconds of the sheep for an operation, by number of {what}", values)


def _caption(content: dict[str, Any]) -> str:
    about = content["machine"]
    compiled = "compiled" if about["compiled"] else "plain"
    return (
        f"{about['processors']} processors, {about['system']}, Python {about['python']}, hot path {compiled}, "
        f"load {about['load'][0]:.1f} before and {content['load_after'][0]:.1f} after. {content['command']}"
    )


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    for path in charts(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
