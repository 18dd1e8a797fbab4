"""Sheep whose journals lie on disks of their own: what happens when one is not there, and when it comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.cluster import RUNNING, Cluster, formatted

SIZE = 24 << 20
SECONDS = 30.0


class Journals(Cluster):
    """Three sheep; a node's journal is in `fast` and its number."""

    def fast(self, node: int) -> Path:
        return self.directory / f"fast{node}"

    def command(self, node: int, extra: Sequence[str] = ()) -> list[str]:
        place = extra or ("-j", f"size=64M,dir={self.fast(node)}")
        return super().command(node, place)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Journals]:
    made = Journals(3, tmp_path, options=())
    try:
        formatted(made)
        yield made
    finally:
        made.close()


def kill_all(cluster: Journals) -> None:
    """Node 2 is not the last: then nobody but it would know what was written last."""
    for node in (2, 1, 0):
        cluster.kill(node)


def write(cluster: Journals, data: bytes, offset: int) -> None:
    cluster.dog("vdi", "write", "v", str(offset), str(len(data)), stdin=data)


def read(cluster: Journals, node: int) -> bytes:
    return cluster.try_dog("vdi", "read", "v", node=node, check=True).stdout


def test_a_journal_whose_disk_is_missing_and_comes_back(cluster: Journals) -> None:
    rng = random.Random(1)
    data = bytearray(rng.randbytes(SIZE))
    cluster.dog("vdi", "create", "v", str(SIZE))
    write(cluster, bytes(data), 0)
    for block in range(20):
        part = rng.randbytes(4096)
        data[block * 65536 : block * 65536 + 4096] = part
        write(cluster, part, block * 65536)
    kill_all(cluster)

    away = cluster.directory / "away"
    cluster.fast(2).rename(away)
    cluster.start(0, 1)
    said = cluster.start_fails(2)
    assert f"{cluster.fast(2)}: the last journal of this node is not there" in said
    assert said.endswith("or give it up with -j size=SIZE,skip")
    assert not cluster.fast(2).exists()

    cluster.start(2, extra={2: ("-j", f"size=64M,dir={cluster.fast(2)},skip")})
    cluster.wait_members(3)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    assert all(read(cluster, node) == data for node in range(3))
    data[:4096] = newest = rng.randbytes(4096)
    write(cluster, newest, 0)
    kill_all(cluster)

    cluster.fast(2).rename(cluster.directory / "under")
    away.rename(cluster.fast(2))
    cluster.start(0, 1)
    cluster.start_fails(2)
    cluster.fast(2).rename(away)
    (cluster.directory / "under").rename(cluster.fast(2))
    cluster.start(2)
    cluster.wait_members(3)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    assert all(read(cluster, node) == data for node in range(3))
