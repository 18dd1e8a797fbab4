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
    results, chart = tmp_path / "matrix.json", tmp_path / "chart.svg"
    run(
        [
            sys.executable, "-m", "tests.bench.matrix", "--rounds", "1", "--seconds", "0.3", "--redundancy", "3",
            "--objects", "2", "--cell", "mixed:4k:4:durable", "--results", results, "--svg", chart,
        ],
        cwd=ROOT, seconds=120,
    )  # fmt: skip
    rows = json.loads(results.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["3 copies", "sheepfs, 3 copies", "nbd, 3 copies"]
    for row in rows:
        assert row["iops"] > 0 and row["cpu_us"] > 0, row
        assert 0 < row["p50_ms"] <= row["p99_ms"], row
    texts = [element.text for element in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert "sheepfs, 3 copies" in texts
