"""System calls of a running sheep fail (strace --inject): a disk's errors take out that disk, the journal's the node.

The client never sees an error, and never other bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, formatted
from tests.support.errors import Injection, SyncInjection
from tests.support.processes import wait_until

MIB = 1 << 20
SIZE = 24 * MIB
SECONDS = 60.0

pytestmark = pytest.mark.skipif(shutil.which("strace") is None or os.geteuid() != 0, reason="strace and root")


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster], tmp_path: Path) -> Cluster:
    """Durable, node 0 with two disks."""
    return formatted(new_cluster(3, options=(), disks={0: [tmp_path / "d1", tmp_path / "d2"]}))


@pytest.fixture
def calling(new_cluster: Callable[..., Cluster], tmp_path: Path) -> Cluster:
    """The same; each sync of a file is a system call of its own."""
    prefix = (sys.executable, "-m", "tests.support.without_kernel_sync")
    return formatted(new_cluster(3, options=(), disks={0: [tmp_path / "d1", tmp_path / "d2"]}, prefix=prefix))


def filled(cluster: Cluster) -> bytearray:
    data = bytearray(random.Random(9).randbytes(SIZE))
    cluster.dog("vdi", "create", "data", str(SIZE))
    cluster.dog("vdi", "write", "data", "0", str(SIZE), stdin=bytes(data))
    return data


def write_everywhere(cluster: Cluster, data: bytearray, node: int) -> None:
    """Small and large durable writes into every object; all must succeed."""
    rng = random.Random(node)
    for start in range(0, SIZE, 4 * MIB):
        for length in (5000, 200_000):
            part = rng.randbytes(length)
            offset = start + rng.randrange(4 * MIB - length)
            cluster.dog("vdi", "write", "data", str(offset), str(length), stdin=part, node=node)
            data[offset : offset + length] = part


def check(cluster: Cluster, data: bytearray) -> None:
    for node in cluster.running_nodes():
        assert cluster.try_dog("vdi", "read", "data", node=node, check=True).stdout == bytes(data)


def an_object(path: Path) -> Path:
    """A data object on either disk of node 0: which of them gets any is chance."""
    return next(file for name in ("d1", "d2") for file in sorted((path / name).iterdir()) if file.name[:2] == "00")


def disks(cluster: Cluster) -> list[str]:
    return [entry["path"] for entry in json.loads(cluster.dog("node", "md", "info", "--json"))]


@pytest.mark.parametrize(
    ("calls", "error"), [("pwrite64", "EIO"), ("fdatasync", "EIO"), ("fdatasync", "ENOSPC"), ("preadv,preadv2", "EIO")]
)
def test_an_error_of_one_file_takes_out_its_disk(calling: Cluster, tmp_path: Path, calls: str, error: str) -> None:
    cluster = calling
    data = filled(cluster)
    victim = an_object(tmp_path)
    (other,) = {str(tmp_path / name) for name in ("d1", "d2")} - {str(victim.parent)}
    everything = len(cluster.objects(0))
    with Injection(cluster.pids(0)[-1], victim, calls, error) as injection:
        write_everywhere(cluster, data, 0)
        if calls.startswith("preadv"):
            cluster.dog("node", "scrub", "start")
        wait_until(lambda: disks(cluster) == [other], SECONDS, "end of the disk")
        assert injection.injected()
    check(cluster, data)
    wait_until(lambda: len(list(Path(other).glob("[0-9a-f]*"))) == everything, SECONDS, "healing")
    cluster.wait_recovered()
    check(cluster, data)


def test_an_error_of_the_journal_ends_the_node_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    data = filled(cluster)
    with SyncInjection(cluster.pids(0)[-1], tmp_path / "strace.txt") as injection:
        write_everywhere(cluster, data, 1)
        wait_until(lambda: 0 not in cluster.running_nodes(), SECONDS, "end of node 0")
        assert injection.ended() == 1  # what failed is not tried again
    cluster.wait_members(2, [1, 2])
    check(cluster, data)
    assert "this node cannot store any more" in cluster.log(0).read_text()


def test_no_room_for_what_the_journal_has_takes_nothing_out(cluster: Cluster, tmp_path: Path) -> None:
    """What was acknowledged stays and is in place later; what is new is refused until then, on this object only."""
    data = filled(cluster)
    place = disks(cluster)
    victim = an_object(tmp_path)
    start = int(victim.name[8:], 16) * 4 * MIB
    cluster.dog("vdi", "create", "-P", "other", str(8 * MIB))
    held = len(cluster.objects(0))
    log = cluster.log(0)

    def write(offset: int, length: int) -> subprocess.CompletedProcess[bytes]:
        part = random.Random(offset).randbytes(length)
        done = cluster.try_dog("vdi", "write", "data", str(offset), str(length), stdin=part)
        if not done.returncode:
            data[offset : offset + length] = part
        return done

    with Injection(cluster.pids(0)[-1], victim, "pwrite64,fallocate", "ENOSPC") as injection:
        assert write(start + 4096, 4096).returncode == 0
        wait_until(lambda: "no room for changes that are under way" in log.read_text(), SECONDS, "a word about it")
        refused = write(start + 16384, 4096)
        assert refused.returncode == 1
        assert b"no space" in refused.stderr.lower(), refused.stderr
        seen = cluster.try_dog("vdi", "read", "data", str(start + 16384), "4096", check=True).stdout
        assert seen in (data[start + 16384 : start + 20480], random.Random(start + 16384).randbytes(4096))
        data[start + 16384 : start + 20480] = seen  # it may have taken effect; what was read stays
        for index in range(SIZE // (4 * MIB)):
            if index * 4 * MIB != start:
                assert write(index * 4 * MIB + 4096, 200_000).returncode == 0
        assert injection.injected()
        check(cluster, data)
        cluster.dog("vdi", "delete", "other")
        wait_until(
            lambda: all(len(cluster.objects(node)) < held for node in range(3)), SECONDS, "space that comes back"
        )
    wait_until(lambda: "there is room again" in log.read_text(), SECONDS, "room again")
    cluster.wait_recovered()
    assert write(start + 16384, 4096).returncode == 0
    check(cluster, data)
    assert disks(cluster) == place
