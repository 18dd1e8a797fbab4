"""Bytes flipped with dd under running sheep, wherever they lie: never given out, repaired or named, and counted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster
from tests.support.processes import run, wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
SIZE = 4 * OBJECT
TRAILER = OBJECT  # offset of it in a data object's file
SECONDS = 60.0


def flip(path: Path, offset: int) -> None:
    """One byte becomes another, as dd does it."""
    with open(path, "rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    run(["dd", f"of={path}", "bs=1", f"seek={offset}", "conv=notrunc"], stdin=bytes([byte ^ 0x5A]))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(3, tmp_path, options=())
    try:
        made.start()
        made.wait_members(3)
        made.format("-c", "3")
        yield made
    finally:
        made.close()


@pytest.fixture
def data(cluster: Cluster) -> bytes:
    made = random.Random(4).randbytes(SIZE)
    cluster.dog("vdi", "create", "data", str(SIZE))
    cluster.dog("vdi", "write", "data", "0", str(SIZE), stdin=made)
    return made


def check(cluster: Cluster, data: bytes) -> None:
    for node in cluster.running_nodes():
        assert cluster.try_dog("vdi", "read", "data", node=node, check=True).stdout == data


def files(cluster: Cluster, node: int) -> list[Path]:
    return sorted(path for name, path in cluster.objects(node).items() if name.startswith("00"))


def restart(cluster: Cluster, node: int) -> None:
    cluster.kill(node)
    cluster.wait_members(2)
    cluster.start(node)
    cluster.wait_members(3)


def scrub(cluster: Cluster, node: int) -> dict[str, Any]:
    """One pass of a node; what it says afterwards."""

    def status() -> dict[str, Any]:
        return dict(json.loads(cluster.try_dog("node", "scrub", "status", "--json", node=node).stdout)[0])

    before = status()["passes"]
    cluster.dog("node", "scrub", "schedule", "48", "512", node=node)
    cluster.dog("node", "scrub", "start", node=node)
    wait_until(lambda: status()["passes"] > before, SECONDS, "one pass", step=0.1)
    return status()


def test_object_files_and_trailers(cluster: Cluster, data: bytes) -> None:
    for node in range(3):
        restart(cluster, node)  # the journal's records are in the files, the trailers on the disk
    cluster.wait_recovered()
    check(cluster, data)
    scrub(cluster, 0)
    mine = files(cluster, 0)
    good = [path.read_bytes() for path in mine]
    flip(mine[0], 123_456)
    flip(mine[1], TRAILER + 44)  # the version
    flip(mine[2], TRAILER + 512 + 8 * 77)  # a block's hash
    flip(mine[3], TRAILER + 3)
    check(cluster, data)
    before = json.loads(cluster.dog("node", "stat", "--json"))
    result = scrub(cluster, 0)
    assert result["lost"] == []
    assert (result["rot"]["found"], result["rot"]["repaired"], result["rot"]["bad"]) == (4, 4, 0)
    after = json.loads(cluster.dog("node", "stat", "--json"))
    assert before["rot_found"] <= after["rot_found"] == after["rot_repaired"] == 4
    assert [path.read_bytes() for path in mine] == good
    for path in mine:
        assert str(path) in cluster.log(0).read_text()
    check(cluster, data)


def test_a_trailer_that_is_read_at_a_start(cluster: Cluster, data: bytes) -> None:
    for node in range(3):
        restart(cluster, node)
    cluster.wait_recovered()
    mine = files(cluster, 1)
    flip(mine[0], TRAILER + 100)  # zeros of the header, which its checksum covers
    flip(mine[1], TRAILER + 512 + 8 * 5)
    restart(cluster, 1)
    check(cluster, data)
    cluster.wait_recovered()
    scrub(cluster, 1)
    assert files(cluster, 1) == mine
    for ours, theirs in zip(mine, files(cluster, 2), strict=True):
        assert ours.read_bytes()[:OBJECT] == theirs.read_bytes()[:OBJECT]
    check(cluster, data)


def test_the_journal(cluster: Cluster, data: bytes) -> None:
    """What a rotten journal takes from one node, the others have; the node says that it is rotten."""
    rng = random.Random(8)
    expected = bytearray(data)
    for _ in range(20):
        at, part = rng.randrange(SIZE - 8192), rng.randbytes(8192)
        cluster.dog("vdi", "write", "data", str(at), "8192", stdin=part)
        expected[at : at + 8192] = part
    for index in (0, 1):
        path = cluster.store(2) / f"journal_file{index}"
        for offset in rng.sample(range(600, 120_000), 40):
            flip(path, offset)
    check(cluster, bytes(expected))
    restart(cluster, 2)
    check(cluster, bytes(expected))
    cluster.wait_recovered()
    check(cluster, bytes(expected))
    assert "is damaged at byte" in cluster.log(2).read_text()


@pytest.mark.parametrize("name", ["superblock", "obj/.disk"])
def test_who_a_store_belongs_to(cluster: Cluster, data: bytes, name: str) -> None:
    """Not known any more: the node does not start, and one line says why; the others serve."""
    flip(cluster.store(0) / name, 20)
    check(cluster, data)
    cluster.kill(0)
    cluster.wait_members(2)
    assert f"{cluster.store(0)}/{name}" in cluster.start_fails(0)
    check(cluster, data)
    flip(cluster.store(0) / name, 20)
    cluster.start(0)
    cluster.wait_members(3)
    check(cluster, data)
