"""The main job, end to end, as a user types it: six nodes, a volume, a filesystem on it, a death, a return, a restart.

Everything is judged from outside: commands and their output, sums of files, object files on the disks of the nodes,
bytes that a process wrote as the kernel counts them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import needs, trees
from tests.support.cluster import RUNNING, Cluster
from tests.support.mounts import LoopMount, SheepFs
from tests.support.processes import run, wait_until

NODES, COPIES = 6, 3
VICTIM = 3  # sheepfs talks to node 0
OBJECT_BYTES = 4 << 20
TREE_BYTES = 24 << 20
BALLAST_BYTES = 320 << 20  # enough objects on the victim for its loss to take time to heal
STALL_SECONDS = 8.0  # the longest that one write may take while a node dies, on a loaded machine
DEATH_SECONDS = 1.0  # the others notice a killed process; well below a second on a quiet machine


class Writer:
    """Writes and syncs small files beside everything else; knows its slowest step and the bytes of each file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.written: dict[str, bytes] = {}
        self.slowest_seconds = 0.0
        self.error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        directory.mkdir()
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                number = len(self.written)
                data = trees.pattern(number, 8192)
                start = time.monotonic()
                with open(self.directory / str(number), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)
                self.written[str(number)] = data
                self._stop.wait(0.02)
        except OSError as error:
            self.error = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the writer hangs"


def test_story(
    new_cluster: Callable[..., Cluster],
    mount_sheepfs: Callable[..., SheepFs],
    mount_loop: Callable[..., LoopMount],
) -> None:
    needs.fuse()
    needs.loop_devices()
    cluster = new_cluster(NODES)
    a_cluster_is_made(cluster)
    tree = mount_sheepfs(cluster)
    volume = tree.volume("replica")
    assert volume.stat().st_size == 20 << 30
    run(["mkfs.ext4", "-q", volume])
    files = mount_loop(volume)
    expected = data_is_copied(files.place)

    writer = Writer(files.place / "writer")
    a_node_dies(cluster, files.place, writer, expected)
    stored = cluster_stored_bytes(cluster, VICTIM)
    a_node_returns(cluster, stored)
    writer.stop()
    assert writer.error is None
    assert writer.slowest_seconds < STALL_SECONDS
    for name, data in writer.written.items():
        assert (writer.directory / name).read_bytes() == data
    assert trees.sums(files.place / "tree") == expected
    run(["sync", "-f", files.place])

    files.unmount()
    run(["e2fsck", "-fn", volume])
    tree.release("replica")
    assert not volume.exists()
    tree.unmount()

    the_cluster_stops_and_starts(cluster)
    tree = mount_sheepfs(cluster, 4)
    files = mount_loop(tree.volume("replica"), "ro")
    assert trees.sums(files.place / "tree") == expected
    assert trees.sums(files.place / "writer").keys() == writer.written.keys()
    files.unmount()
    tree.release("replica")
    tree.unmount()


def a_cluster_is_made(cluster: Cluster) -> None:
    cluster.start()
    cluster.wait_members(NODES, range(NODES))
    assert cluster.dog("cluster", "info").startswith("Cluster status: Waiting for cluster to be formatted")
    assert cluster.dog("cluster", "format") == "using backend plain store\n"
    cluster.wait_status(RUNNING)
    assert cluster.dog("cluster", "info", "-v").splitlines()[:2] == [
        "Cluster status: running, auto-recovery enabled",
        f"Cluster store: plain with {COPIES} redundancy policy",
    ]
    assert cluster.dog("vdi", "create", "-c", str(COPIES), "replica", "20G") == ""
    row = cluster.dog("vdi", "list", "-r").rstrip("\n").split(" ")
    assert (row[0], row[1], row[2], row[3], row[4]) == ("=", "replica", "0", str(20 << 30), "0"), "a new volume is thin"
    assert [line.split() for line in cluster.dog("node", "list", "-r").splitlines()] == [
        [str(node), f"127.0.0.1:{cluster.port(node)}", "128", str(node)] for node in range(NODES)
    ]
    total = cluster.dog("node", "info", "-r").splitlines()[-1].split()
    assert total[0] == "Total"
    assert int(total[5]) == 20 << 30, "the size of all volumes"


def data_is_copied(mount: Path) -> dict[str, str]:
    """A tree of real files and some ballast, all on the disks of the cluster; the sums of the tree."""
    assert trees.copy_of_python(mount / "tree", TREE_BYTES) > TREE_BYTES // 2
    with open(mount / "tree" / "ballast", "wb") as ballast:
        for part in range(BALLAST_BYTES >> 20):
            ballast.write(trees.pattern(part, 1 << 20))
    run(["sync", "-f", mount])
    return trees.sums(mount / "tree")


def a_node_dies(cluster: Cluster, mount: Path, writer: Writer, expected: dict[str, str]) -> None:
    wait_until(lambda: len(writer.written) > 2, 30, "the writer's first files")
    before = len(writer.written)
    survivors = [node for node in range(NODES) if node != VICTIM]
    for survivor in survivors:  # so slow that nobody misses it
        cluster.dog("node", "recovery", "set-throttle", "1", "300", node=survivor)
    cluster.kill(VICTIM)
    assert cluster.wait_members(NODES - 1, survivors) < DEATH_SECONDS + 1.0
    seen: list[list[str]] = []
    deadline = time.monotonic() + 20
    while not any(int(row[5]) for row in seen) and time.monotonic() < deadline:
        seen = cluster.recovering()  # a total of 0: still finding out what there is to do
    assert seen, "dog node recovery showed nobody healing"
    for node, address, vnodes, zone, finished, total in seen:
        assert address != f"127.0.0.1:{cluster.port(VICTIM)}"
        assert int(finished) <= int(total)
        assert (vnodes, int(node) < NODES - 1, int(zone) < NODES) == ("128", True, True)
    for survivor in survivors:
        cluster.dog("node", "recovery", "set-throttle", "0", "0", node=survivor)
    cluster.wait_recovered()
    assert cluster.dog("node", "recovery").count("\n") == 2, "only the heading when nobody recovers"
    wait_until(lambda: len(writer.written) > before + 2, 60, "writes go on without the node")
    assert writer.error is None
    run(["sync", "-f", mount])
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert trees.sums(mount / "tree") == expected


def cluster_stored_bytes(cluster: Cluster, node: int) -> int:
    """Bytes that a node's object files take on its disk."""
    return sum(path.stat().st_blocks * 512 for path in cluster.objects(node).values())


def a_node_returns(cluster: Cluster, stored_bytes: int) -> None:
    """It joins, and what it wrote to its disk is far less than what it had and kept."""
    assert stored_bytes > BALLAST_BYTES * COPIES // NODES // 2, "the node had its share"
    files = {name: path.stat().st_ino for name, path in cluster.objects(VICTIM).items()}
    cluster.start(VICTIM)
    cluster.wait_members(NODES, range(NODES))
    cluster.wait_recovered()
    written = 0
    for pid in cluster.pids(VICTIM):
        counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        written += int(counters["wchar"])
    assert written < stored_bytes // 3, f"wrote {written >> 20} MiB to keep {stored_bytes >> 20} MiB"
    now = cluster.objects(VICTIM)
    kept = sum(1 for name, inode in files.items() if name in now and now[name].stat().st_ino == inode)
    assert kept > 0.9 * len(files), f"kept {kept} of {len(files)} object files"
    info = cluster.dog("cluster", "info", "-r").splitlines()
    assert [line.split()[1] for line in info[2:]] == ["3", "2", "1"], "one epoch for the loss, one for the return"


def copies_are_equal(cluster: Cluster) -> None:
    """Each object has exactly three copies on the disks of stopped nodes, with equal bytes."""
    places: dict[str, list[Path]] = {}
    for node in range(NODES):
        for name, path in cluster.objects(node).items():
            places.setdefault(name, []).append(path)
    assert len(places) > BALLAST_BYTES // OBJECT_BYTES
    assert {name: len(paths) for name, paths in places.items() if len(paths) != COPIES} == {}
    for name, paths in places.items():
        with open(paths[0], "rb") as file:
            first = file.read(OBJECT_BYTES)
        for path in paths[1:]:
            with open(path, "rb") as file:
                assert file.read(OBJECT_BYTES) == first, f"copies of {name} differ"


def the_cluster_stops_and_starts(cluster: Cluster) -> None:
    epochs = cluster.dog("cluster", "info", "-r").splitlines()[2:]
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    copies_are_equal(cluster)
    for node in (5, 2, 4, 0, 3, 1):
        cluster.start(node)
    cluster.wait_members(NODES, range(NODES))
    cluster.wait_status(RUNNING)
    assert cluster.dog("cluster", "info", "-r").splitlines()[2:] == epochs, "no new epoch when all come back"
    assert cluster.dog("vdi", "list", "-r").split(" ")[1] == "replica"
