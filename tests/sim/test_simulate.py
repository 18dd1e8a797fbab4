"""`dog simulate`: what it says of made-up clusters, against what is known without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sheepdog.cluster.sim.forecast import Topology, plan
from sheepdog.tools.dog.main import main


def ask(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, dict[str, Any]]:
    status = main(["simulate", *words.split(), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_one_of_equal_nodes_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """What it held, a sixth of everything, is copied again, and by all of the others."""
    status, said = ask(capsys, "--nodes 6 --used 6T --fail node:3 --rate 100M")
    moved = said["plan"]["moved_bytes"] / (6 << 40)
    assert status == 0
    assert 0.13 < moved < 0.21
    assert sorted(said["plan"]["receives"]) == ["0", "1", "2", "4", "5"]
    assert sum(said["plan"]["holds"].values()) == pytest.approx(6 << 40, rel=0.001)
    busiest = max([*said["plan"]["receives"].values(), *said["plan"]["sends"].values()])
    assert said["plan"]["seconds"] == pytest.approx(busiest / (100 << 20))
    assert (said["plan"]["unreadable"], said["plan"]["one_more"], said["plan"]["narrow"]) == (0, 0, 0)


def test_too_few_zones_and_lost_copies_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = ask(capsys, "--nodes 6 --zones 3 --fail zone:1")
    assert (status, said["plan"]["narrow"], said["plan"]["unreadable"]) == (0, 1.0, 0)
    assert said["plan"]["moved_bytes"] == 0
    status, said = ask(capsys, "--nodes 4 -c 2 --fail node:0,node:1")
    assert status == 1
    assert 0.05 < said["plan"]["unreadable"] < 0.4
    status, said = ask(capsys, "--nodes 6 -c 4:2 --fail node:0,node:1")
    assert (status, said["plan"]["unreadable"], said["plan"]["one_more"]) == (0, 0, 1.0)


def test_a_file_names_the_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nodes.json"
    nodes = [{"zone": 1, "size": "1T"}, {"zone": 2, "size": "1T"}, {"zone": 3, "size": "2T"}, {"zone": 4, "vnodes": 0}]
    path.write_text(json.dumps({"copies": 1, "used": "100G", "nodes": nodes}))
    status, said = ask(capsys, f"--topology {path} --fail zone:3")
    assert status == 1
    assert 0.4 < said["plan"]["unreadable"] < 0.6, "the larger disk holds half of all"


def test_the_rehearsal_runs_the_core(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = ask(capsys, "--nodes 4 --zones 4 --fail node:2 --seeds 2")
    rehearsal = said["rehearsal"]
    assert status == 0
    assert (rehearsal["seeds"], rehearsal["violations"]) == (2, [])
    assert rehearsal["operations"] > 1000
    assert max(rehearsal["pauses_ns"]) > 10_000_000, "the death was not felt"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--fail node:1", "one of --from-cluster"),
        ("--nodes 3", "--fail takes"),
        ("--nodes 3 --fail node:3", "there is no node 3"),
        ("--nodes 1 --fail node:0", "nothing would be left"),
        ("--nodes 40 --fail node:0 --seeds 1", "up to 12"),
    ],
)
def test_wrong_words_are_refused(words: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *words.split()]) == 64
    assert reason in capsys.readouterr().err


def test_a_person_can_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--nodes", "5", "--used", "10T", "--fail", "node:1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("5 nodes, 3 copies, 10 TB in all; without node 1:\n  moves ")
    assert "Assumed: every node copies 200 MB in a second" in said


def test_vnodes_follow_the_capacity_that_is_left() -> None:
    """Automatic vnodes change on the others, too: what that moves is counted."""
    from sheepdog.tools.dog.simulate import _member

    members = [_member(number, number, 128, size) for number, size in enumerate(("1T", "1T", "1T", "8T"))]
    moved = {
        automatic: plan(Topology(members, 1, 0, 1 << 40, automatic), [0], 1e6).moved_bytes
        for automatic in (True, False)
    }
    assert moved[True] != moved[False]
