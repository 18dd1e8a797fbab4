"""The daemon's log: whom a line names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sheepdog.cluster.host.logs import Logs
from sheepdog.cluster.host.loop import new_loop
from sheepdog.cluster.host.options import LogOptions

INFO = 6


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    logs = Logs(LogOptions(format="json"), str(tmp_path))
    yield logs
    logs.close()


def origin(directory: Path) -> tuple[str, int]:
    """Function and line that the log's last line names."""
    record = json.loads((directory / "sheep.log").read_text().splitlines()[-1])
    return record["function"], record["line"]


def test_a_line_names_the_function_that_wrote_it(logs: Logs, tmp_path: Path) -> None:
    logs.write(INFO, "one")
    name, line = origin(tmp_path)
    assert name == "test_a_line_names_the_function_that_wrote_it"
    logs.write(INFO, "five lines further")
    assert origin(tmp_path) == (name, line + 3)


def test_what_has_no_frame_is_not_taken_for_the_loop(logs: Logs, tmp_path: Path) -> None:
    """As functions of C, so those that were compiled."""
    loop = new_loop(logs.write)
    loop.call_soon(partial(logs.write, INFO, "from C"))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert origin(tmp_path) == ("compiled", 0)


def test_what_is_below_the_level_is_not_written(logs: Logs, tmp_path: Path) -> None:
    logs.write(INFO + 1, "debug")
    assert (tmp_path / "sheep.log").read_text() == ""
