"""What lies on the disks: rotten bytes are never given out and get repaired; deleted space really comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support import trees
from tests.support.cluster import Cluster
from tests.support.processes import wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
SIZE = 3 * OBJECT
REPAIR_SECONDS = 30.0
RECLAIM_SECONDS = 60.0
ERROR_SECONDS = 20.0  # until a read of what nobody has any more fails


def data_files(cluster: Cluster) -> dict[str, list[Path]]:
    """Files of data objects on all nodes, by the object's name."""
    found: dict[str, list[Path]] = {}
    for node in range(cluster.count):
        for name, path in cluster.objects(node).items():
            if name.startswith("00"):
                found.setdefault(name, []).append(path)
    return found


def spoil(path: Path, offset: int) -> None:
    """Changes one byte, as a disk might; the file's times stay."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def written(cluster3: Cluster) -> bytes:
    data = trees.pattern(5, SIZE)
    cluster3.dog("vdi", "create", "data", str(SIZE))
    cluster3.dog("vdi", "write", "data", "0", str(SIZE), stdin=data)
    return data


def read(cluster: Cluster, node: int) -> bytes:
    return cluster.try_dog("vdi", "read", "data", node=node, check=True).stdout


def test_a_rotten_copy_is_not_given_out_and_is_repaired(cluster3: Cluster, written: bytes) -> None:
    files = data_files(cluster3)
    assert [len(paths) for paths in files.values()] == [3, 3, 3]
    for turn, paths in enumerate(files.values()):
        spoil(paths[turn], 100_000 * (turn + 1))  # another node's copy of each object
    assert [read(cluster3, node) for node in range(3)] == [written] * 3

    def repaired() -> bool:
        assert read(cluster3, 0) == written
        return all(len({path.read_bytes()[:OBJECT] for path in paths}) == 1 for paths in files.values())

    wait_until(repaired, REPAIR_SECONDS, "repair of what was read", step=0.2)


def test_without_a_good_copy_there_is_an_error_and_no_zeros(cluster3: Cluster, written: bytes) -> None:
    name, paths = sorted(data_files(cluster3).items())[1]
    assert name.endswith("00000001")
    for path in paths:
        spoil(path, 8192)
    for node in range(3):
        failed = cluster3.try_dog("vdi", "read", "data", str(OBJECT), "65536", node=node, seconds=ERROR_SECONDS)
        assert failed.returncode == 1
        assert b"Failed to read" in failed.stderr
    good = cluster3.try_dog("vdi", "read", "data", "0", str(OBJECT), check=True).stdout
    assert good == written[:OBJECT], "the other objects are not affected"


def test_deleted_space_comes_back(cluster3: Cluster, written: bytes) -> None:
    cluster3.dog("vdi", "snapshot", "-s", "one", "data")
    cluster3.dog("vdi", "write", "data", "0", str(MIB), stdin=trees.pattern(6, MIB))
    cluster3.dog("vdi", "clone", "-s", "one", "data", "copy")
    cluster3.dog("vdi", "write", "copy", str(OBJECT), str(MIB), stdin=trees.pattern(7, MIB))
    assert len(data_files(cluster3)) == 3 + 1 + 1
    cluster3.dog("vdi", "delete", "data")
    cluster3.dog("vdi", "delete", "-s", "one", "data")
    rest = cluster3.try_dog("vdi", "read", "copy", check=True).stdout
    assert rest == written[:OBJECT] + trees.pattern(7, MIB) + written[OBJECT + MIB :], "the clone keeps what it shares"
    cluster3.dog("vdi", "delete", "copy")
    wait_until(lambda: not data_files(cluster3), RECLAIM_SECONDS, "removal of all data objects", step=0.2)
    blocks = sum(path.stat().st_blocks for node in range(3) for path in cluster3.objects(node).values())
    assert blocks * 512 < MIB, "what is left of deleted volumes is sparse"
    assert cluster3.dog("vdi", "list", "-r") == ""
