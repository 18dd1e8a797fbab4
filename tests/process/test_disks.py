"""Disks of real nodes come, go and fail while a volume is in use: nothing is lost, and only that disk is out."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, formatted
from tests.support.errors import DeathInjection
from tests.support.processes import environment, wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
OBJECTS = 12
SIZE = OBJECTS * OBJECT
STALL_SECONDS = 30.0  # so long nothing has moved; all of it takes 20 s on a machine that is busy with other tests
MOST_CHANGES = 1000  # an object comes once or twice, and goes once


class Load:
    """Reads and writes through one node until the end; every read is compared."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        self.cluster = cluster
        self.node = node
        self.random = random.Random(3)
        self.data = bytearray(self.random.randbytes(SIZE))
        cluster.dog("vdi", "create", "data", str(SIZE))
        cluster.dog("vdi", "write", "data", "0", str(SIZE), stdin=bytes(self.data))
        self.errors: list[str] = []
        self.turns = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.errors, self.errors
        assert self.turns > 2

    def _run(self) -> None:
        while not self._stop.is_set() and not self.errors:
            offset, length = self.random.randrange(SIZE - MIB), self.random.randrange(1, 300_000)
            part = self.random.randbytes(length)
            place = ("data", str(offset), str(length))
            done = self.cluster.try_dog("vdi", "write", *place, stdin=part, node=self.node)
            if done.returncode:
                self.errors.append(f"write {place}: {done.stderr!r}")
                return
            self.data[offset : offset + length] = part
            read = self.cluster.try_dog("vdi", "read", *place, node=self.node)
            if read.returncode or read.stdout != part:
                self.errors.append(f"read {place}: {len(read.stdout)} bytes, {read.stderr!r}")
            self.turns += 1

    def wait_turns(self, count: int) -> None:
        until = self.turns + count
        wait_until(lambda: self.turns >= until or bool(self.errors), STALL_SECONDS, f"{count} more requests")

    def check(self) -> None:
        for node in self.cluster.running_nodes():
            assert self.cluster.try_dog("vdi", "read", "data", node=node, check=True).stdout == bytes(self.data)


def wait_for_count(count: Callable[[], int], wanted: int, what: str) -> None:
    """However long it takes, as long as it goes on."""
    seen = count()

    def changed() -> bool:
        nonlocal seen
        before, seen = seen, count()
        return seen != before

    for _ in range(MOST_CHANGES):
        if seen == wanted:
            return
        wait_until(changed, STALL_SECONDS, f"{what}: {seen} of {wanted}")
    raise AssertionError(f"{what}: goes up and down")


def count(directory: Path) -> int:
    return sum(1 for path in directory.iterdir() if len(path.name) == 16) if directory.is_dir() else 0


def epochs(cluster: Cluster) -> int:
    return len(json.loads(cluster.dog("cluster", "info", "--json", node=1))["epochs"])


def disks(cluster: Cluster) -> list[str]:
    return [entry["path"] for entry in json.loads(cluster.dog("node", "md", "info", "--json"))]


def copies(cluster: Cluster) -> int:
    """Object files of node 0."""
    return sum(count(Path(path)) for path in disks(cluster))


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster], tmp_path: Path) -> Cluster:
    """Durable, node 0 with two disks."""
    return formatted(new_cluster(3, options=(), disks={0: [tmp_path / "d1", tmp_path / "d2"]}))


def test_disks_fail_come_and_go_under_load(cluster: Cluster, tmp_path: Path) -> None:
    d1, d2, d3 = (tmp_path / name for name in ("d1", "d2", "d3"))
    load = Load(cluster, node=0)
    everything = OBJECTS + 1  # its inode
    assert count(d1) + count(d2) == everything
    before = epochs(cluster)
    with load:
        shutil.rmtree(d1)  # a disk that fails
        wait_until(lambda: disks(cluster) == [str(d2)], STALL_SECONDS, "end of the first disk")
        wait_for_count(lambda: count(d2), everything, "healing")
        load.wait_turns(2)

        cluster.dog("node", "md", "plug", "-f", str(d3))
        assert disks(cluster) == [str(d2), str(d3)]
        wait_until(lambda: count(d3) > 0, STALL_SECONDS, "moves to the new disk")
        wait_for_count(lambda: copies(cluster), everything, "moves to the new disk")
        load.wait_turns(2)

        cluster.dog("node", "md", "unplug", "-f", str(d2))
        assert disks(cluster) == [str(d3)]
        wait_for_count(lambda: count(d3), everything, "healing after unplug")
        load.wait_turns(2)
    assert epochs(cluster) == before, "membership is not touched by disks"
    cluster.wait_recovered()
    load.check()
    again = cluster.try_dog("node", "md", "plug", "-f", str(d3))
    assert (again.returncode, b"look for sheep.log" in again.stderr) == (1, True)

    # What lies on the unplugged disk is old. It must not count when the node starts with it again.
    cluster.kill(0)
    cluster.disks[0] = [d2, d3]
    with load_again(load, 1):
        cluster.wait_members(2, [1, 2])
        cluster.start(0)
        cluster.wait_members(3)
    cluster.wait_recovered()
    wait_for_count(lambda: copies(cluster), everything, "one copy of each object")
    load.check()
    cluster.kill(1)
    cluster.kill(2)  # only node 0 is left: all it has must be right
    cluster.wait_members(1, [0])
    load.check()


def load_again(load: Load, node: int) -> Load:
    """The same volume, through another node."""
    load.node = node
    load._stop = threading.Event()
    load._thread = threading.Thread(target=load._run)
    return load


def test_the_last_disk_gone_ends_the_node_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    load = Load(cluster, node=1)
    with load:
        for name in ("d1", "d2"):
            shutil.rmtree(tmp_path / name)
        wait_until(lambda: 0 not in cluster.running_nodes(), STALL_SECONDS, "end of node 0")
        cluster.wait_members(2, [1, 2])
        load.wait_turns(2)
    load.check()
    assert "leaving the cluster" in cluster.log(0).read_text()


def test_unplugging_the_last_disk_ends_the_node_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kill(0, signal.SIGTERM)
    cluster.wait_members(2, [1, 2])
    command = [*cluster.command(0), "-f"]
    sheep = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
    try:
        cluster.wait_members(3)
        load = Load(cluster, node=1)
        with load:
            done = cluster.try_dog("node", "md", "unplug", "-f", f"{tmp_path}/d1,{tmp_path}/d2")
            assert done.returncode == 0, done.stderr
            assert sheep.wait(timeout=STALL_SECONDS) == 1
            cluster.wait_members(2, [1, 2])
            load.wait_turns(2)
        load.check()
    finally:
        sheep.kill()
        sheep.wait()
    said = [line for line in cluster.log(0).read_text().splitlines() if "last disk" in line]
    assert len(said) == 1 and said[0].endswith(
        f"{tmp_path}/d2 is out of service: the last disk was unplugged; leaving the cluster"
    ), said


def test_a_volume_with_one_copy_keeps_its_disk(cluster: Cluster, tmp_path: Path) -> None:
    cluster.dog("vdi", "create", "-P", "-c", "1", "single", str(8 * OBJECT))
    refused = [cluster.try_dog("node", "md", "unplug", "-f", str(tmp_path / name)).returncode for name in ("d1", "d2")]
    assert 1 in refused
    assert "no other node has the object" in cluster.log(0).read_text()


def test_a_node_that_starts_with_fewer_disks(cluster: Cluster, tmp_path: Path) -> None:
    """What it lacks is healed. Where nobody has the last write, that is an error: neither zeros nor what was before."""
    d1, d2, d3 = (tmp_path / name for name in ("d1", "d2", "d3"))
    load = Load(cluster, node=1)
    cluster.kill(0)
    shutil.rmtree(d1)
    with load:
        cluster.wait_members(2, [1, 2])
        cluster.disks[0] = [d2, d3]
        cluster.start(0)
        cluster.wait_members(3)
        load.wait_turns(2)
    cluster.wait_recovered()
    assert copies(cluster) == OBJECTS + 1
    cluster.kill(1)
    cluster.kill(2)
    cluster.wait_members(1, [0])
    load.check()

    here = write_alone(cluster, d2)
    cluster.kill(0)
    shutil.rmtree(d3)
    cluster.disks[0] = [d2]
    check_what_is_left(cluster, here)


@pytest.mark.skipif(shutil.which("strace") is None or os.geteuid() != 0, reason="strace and root")
def test_a_node_dies_before_it_has_noted_what_its_disk_takes_along(cluster: Cluster, tmp_path: Path) -> None:
    """META/settled says yet that all is here and current: what is not here must not be taken for deleted."""
    Load(cluster, node=0)
    cluster.kill(0)
    cluster.start(0)  # its journal has nothing of the inode any more, from which it could make that anew
    cluster.wait_members(3)
    cluster.wait_recovered()
    for node in (1, 2):
        cluster.kill(node)
    cluster.wait_members(1, [0])
    here = write_alone(cluster, tmp_path / "d2")
    settled = cluster.store(0) / "settled.new"
    with DeathInjection(cluster.pids(0)[-1], settled, tmp_path / "strace.txt"):
        shutil.rmtree(tmp_path / "d1")
        wait_until(lambda: 0 not in cluster.running_nodes(), STALL_SECONDS, "death of node 0")
    cluster.disks[0] = [tmp_path / "d2"]
    check_what_is_left(cluster, here)


WRITTEN = b"n" * SIZE


def write_alone(cluster: Cluster, disk: Path) -> set[int]:
    """The last write of everything, on node 0, which is alone; which objects are on that disk and can be read there."""
    cluster.dog("vdi", "write", "data", "0", str(SIZE), stdin=WRITTEN)
    names = [path.name for path in disk.iterdir()]
    inode_here = any(name.startswith("80") for name in names)
    return {int(name[-8:], 16) for name in names if name.startswith("00") and inode_here}


def check_what_is_left(cluster: Cluster, here: set[int]) -> None:
    """All start, node 0 with one disk: what it still has is the newest, and nobody has the rest."""
    cluster.start()
    cluster.wait_members(3)
    for index in range(OBJECTS):
        done = cluster.try_dog("vdi", "read", "data", str(index * OBJECT), str(OBJECT), node=2)
        if index in here:
            assert (done.returncode, done.stdout) == (0, WRITTEN[:OBJECT]), index
        else:
            assert done.returncode and done.stdout != WRITTEN[:OBJECT], index
    health = cluster.try_dog("cluster", "health", node=2).stdout
    assert b"without a current copy" in health
