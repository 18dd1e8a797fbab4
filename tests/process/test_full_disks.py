"""Disks of 64 MiB that fill: NO_SPACE before anything breaks, deletes work, and service comes back by itself."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.cluster import Cluster
from tests.support.processes import run, wait_until

MIB = 1 << 20
DISK_MIB = 64
SIZE = 128 * MIB
SECONDS = 60.0
SURE = 40  # MiB that fit beside the journal, the inodes and the reserve

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def unmounted(path: Path) -> bool:
    return not run(["umount", path], check=False).returncode


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes, each with a file system in memory of its own."""
    made = Cluster(3, tmp_path, options=())  # journals of 8 MiB
    mounted: list[Path] = []
    try:
        for node in range(3):
            made.store(node).mkdir()
            run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}M", "tmpfs", made.store(node)])
            mounted.append(made.store(node))
        made.start()
        made.wait_members(3)
        made.format("-c", "3")
        yield made
    finally:
        made.close()
        for path in mounted:  # a process that has just ended may still keep it busy
            wait_until(partial(unmounted, path), SECONDS, f"umount {path}")


def block(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def fill(cluster: Cluster, name: str) -> int:
    """Writes MiB after MiB until there is no room for one; how many there was room for."""
    cluster.dog("vdi", "create", name, str(SIZE))
    cluster.dog("vdi", "write", name, "0", str(SURE * MIB), stdin=b"".join(map(block, range(SURE))))
    for number in range(SURE, SIZE // MIB):
        done = cluster.try_dog("vdi", "write", name, str(number * MIB), str(MIB), stdin=block(number))
        if done.returncode:
            assert b"no space" in done.stderr.lower(), done.stderr
            return number
    raise AssertionError("the disks never became full")


def check(cluster: Cluster, name: str, written: int) -> None:
    for node in range(3):
        data = cluster.try_dog("vdi", "read", name, "0", str(written * MIB), node=node, check=True).stdout
        assert all(data[number * MIB : (number + 1) * MIB] == block(number) for number in range(written))


def fill_up(path: Path) -> Path:
    """Somebody else takes the rest of a file system."""
    file = path / "somebody-elses"
    with open(file, "wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
    return file


def test_full_disks_refuse_and_come_back(cluster: Cluster) -> None:
    written = fill(cluster, "first")
    check(cluster, "first", written)
    foreign = [fill_up(cluster.store(node)) for node in range(3)]
    for number in range(0, written, 11):  # what is there can be changed, and changed back
        for data in (block(number + 1), block(number)):
            cluster.dog("vdi", "write", "first", str(number * MIB), "8192", stdin=data[:8192])
    assert cluster.running_nodes() == [0, 1, 2]
    cluster.dog("vdi", "delete", "first")
    wait_until(
        lambda: not any(name.startswith("00") for node in range(3) for name in cluster.objects(node)),
        SECONDS,
        "deletion on full disks",
    )
    for file in foreign:
        file.unlink()
    assert fill(cluster, "second") >= written - 8
    cluster.dog("vdi", "delete", "second")


def test_a_node_restarts_on_a_full_disk(cluster: Cluster) -> None:
    written = fill(cluster, "data")
    fill_up(cluster.store(0))
    cluster.dog("vdi", "write", "data", "0", "8192", stdin=block(0)[:8192])
    cluster.kill(0)
    cluster.wait_members(2, [1, 2])
    cluster.start(0)
    cluster.wait_members(3)
    check(cluster, "data", written)
