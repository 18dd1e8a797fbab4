"""The benchmark measures what it says: a cell of the matrix through every door, with figures of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

import pytest
from tests.support.processes import run

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [name for name in ("fio", "nbdkit") if which(name) is None]


@pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {', '.join(NEEDED)}")
@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting needs root and /dev/fuse")
def test_a_cell_of_the_matrix_through_every_door(tmp_path: Path) -> None:
    results, charts = tmp_path / "matrix.json", tmp_path / "charts"
    run(
        [
            sys.executable, "-m", "tests.bench.matrix", "--rounds", "1", "--seconds", "0.3", "--redundancy", "3",
            "--objects", "2", "--cell", "mixed:4k:4:durable", "--results", results, "--charts", charts,
        ],
        cwd=ROOT, seconds=120,
    )  # fmt: skip
    rows = json.loads(results.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["3 copies", "sheepfs, 3 copies", "nbd, 3 copies"]
    for row in rows:
        assert row["iops"] > 0 and row["cpu_us"] > 0, row
        assert 0 < row["p50_ms"] <= row["p99_ms"], row
    assert sorted(path.stem for path in charts.iterdir()) == [
        "doors-4k", "doors-cpu", "native-4k", "native-cpu", "native-latency",
    ]  # fmt: skip
    assert {"3 copies", "sheepfs, 3 copies", "nbd, 3 copies"} <= set(texts(charts / "doors-4k.svg"))
    (of_native,) = (row for row in rows if row["variant"] == "3 copies")
    shown = texts(charts / "native-cpu.svg")
    assert f"{of_native['cpu_us']:,.0f}" in shown or f"{of_native['cpu_us']:,.3g}" in shown
    assert "nbd, 3 copies" not in shown
    assert "--cell mixed:4k:4:durable" in " ".join(shown), "a chart says by which command it was made"


def texts(chart: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")]
