"""What benchmarks leave behind: JSON with few digits, and charts that say where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.bench import results
from tests.bench.fio import FioLoad
from tests.bench.many import Table

from sheepdog.cluster.client.workload import parse_cell

MACHINE = {**results.machine(), "load": (0.5, 1.0, 1.0)}


def saved(directory: Path, **content: Any) -> Path:
    path = directory / "made" / "results.json"
    results.save(path, {"machine": MACHINE, "command": "python -m tests.bench.x", **content})
    return path


def texts(chart: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")]


def row(variant: str, cell: str, **figures: float) -> dict[str, object]:
    usual = {"iops": 1000.0, "megabytes_per_second": 4.1, "spread": 0.1, "cpu_us": 20.0, "p50_ms": 1.0, "p99_ms": 2.0}
    return {"variant": variant, "cell": cell, **usual, **figures}


def test_what_is_saved_has_the_digits_that_count(directory: Path) -> None:
    content = json.loads(saved(directory, rows=[{"iops": 2120.9019633, "bytes": 123456789}]).read_text())
    assert content["rows"] == [{"iops": 2121.0, "bytes": 123456789}]
    assert len(content["load_after"]) == 3


def test_the_charts_of_a_matrix(directory: Path) -> None:
    """Each row where it belongs; what could not be measured nowhere."""
    rows = [
        row("3 copies", "4k read, depth 1", iops=5678.0, spread=0.3),
        row("peer, 3 copies", "4k read, depth 1", iops=1234.0),
        row("nbd, 3 copies", "4k read, depth 1", iops=2345.0),
        row("nbd, 4:2", "4k read, depth 1", iops=777.0),
        row("4:2", "1M write, depth 4, durable", megabytes_per_second=99.0),
        {"variant": "3 copies", "cell": "4M read, depth 4", "error": "no"},
    ]
    drawn = {path.stem: texts(path) for path in results.charts(saved(directory, rows=rows), directory / "charts")}
    assert sorted(drawn) == ["doors-4k", "doors-cpu", "native-4k", "native-cpu", "native-large", "native-latency"]
    assert {"5,678 \u00b115%", "1,234 \u00b15%"} <= set(drawn["native-4k"])
    assert {"5,678 \u00b115%", "2,345 \u00b15%"} <= set(drawn["doors-4k"])
    assert not {"1,234 \u00b15%", "777 \u00b15%"} & set(drawn["doors-4k"])
    assert "99 \u00b15%" in drawn["native-large"] and "4M read, depth 4" not in drawn["native-large"]
    assert "2 (1.00)" in drawn["native-latency"]
    (alone,) = results.charts(saved(directory, rows=rows[4:5]), directory / "alone")
    assert alone.stem == "native-large", "one door is no comparison of doors"
    for chart in drawn.values():
        caption = " ".join(chart)
        assert "load 0.5 before" in caption and "python -m tests.bench.x" in caption


def test_the_charts_of_what_there_are_many_of(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("volumes", "read, us", "write, us", "memory, MiB")
    table.add(1, 14.4, 23.0, 38)
    table.add(1000, 9.876, 27.2, 64)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| volumes | read, us | write, us | memory, MiB |",
        "| ---: | ---: | ---: | ---: |",
        "| 1 | 14 | 23 | 38 |",
        "| 1,000 | 9.88 | 27 | 64 |",
    ]
    (chart,) = results.charts(saved(directory, tables=[table.content()]), directory)
    assert chart.name == "many-volumes.svg"
    assert {"1 volumes", "1,000 volumes", "read, us", "14", "9.88", "27"} <= set(texts(chart))
    assert "64" not in texts(chart), "memory is no time"


def test_fio_is_told_parts_of_seconds_in_its_words() -> None:
    """Of 0.6 seconds it made 0, which ended when all of the volume had been written, and of 1.5 one."""
    words = FioLoad("nbd://host/v", 2).command(parse_cell("write:4k:16:volatile"), 0.6)
    assert "--runtime=600ms" in words
