"""A cluster whose nodes were all stopped: who may start again, in which order, and with which data."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from tests.support import native, trees
from tests.support.cluster import RUNNING, WAIT_FOR_FORMAT, WAIT_FOR_JOIN, Cluster, started

from sheepdog.cluster.core.ids import Epoch, EpochRecord
from sheepdog.cluster.host.directory import read_file, write_file
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.node_state import decode_epoch, encode_epoch

MIB = 1 << 20
VOLUME_BYTES = 20 * MIB
WAITING_TEXT = "Cluster status: Waiting for other nodes to join cluster"


def filled(cluster: Cluster, *options: str) -> bytes:
    """A formatted cluster with a volume `data`; its bytes."""
    cluster.format(*options)
    data = trees.pattern(1, VOLUME_BYTES)
    cluster.dog("vdi", "create", "data", str(VOLUME_BYTES))
    cluster.dog("vdi", "write", "data", "0", str(VOLUME_BYTES), stdin=data)
    return data


def contents(cluster: Cluster, node: int) -> bytes:
    return cluster.try_dog("vdi", "read", "data", node=node, check=True).stdout


def epochs(cluster: Cluster, node: int) -> list[str]:
    """`EPOCH [MEMBERS]` rows, newest first."""
    rows = cluster.dog("cluster", "info", "-r", node=node).splitlines()[2:]
    return [row.split(" ", 1)[1] for row in rows]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_after_a_shutdown_any_order_will_do(new_cluster: Callable[..., Cluster], order: Sequence[int]) -> None:
    cluster = started(new_cluster(4))
    data = filled(cluster)
    before = epochs(cluster, 0)
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    for node in order:
        cluster.start(node)
        cluster.wait_members(order.index(node) + 1, [node])
        if node != order[-1]:
            cluster.wait_status(WAIT_FOR_JOIN, [node])
            assert cluster.dog("cluster", "info", node=node).splitlines()[0] == WAITING_TEXT
    cluster.wait_status(RUNNING)
    assert [epochs(cluster, node) for node in range(4)] == [before] * 4
    assert contents(cluster, order[-1]) == data


def test_the_members_of_the_last_epoch_decide(new_cluster: Callable[..., Cluster]) -> None:
    """Nodes of an older epoch wait for the newest one's, however many they are."""
    cluster = started(new_cluster(4))
    filled(cluster)
    cluster.kill(3)
    cluster.wait_members(3)
    cluster.wait_recovered()
    newer = trees.pattern(2, VOLUME_BYTES)
    cluster.dog("vdi", "write", "data", "0", str(VOLUME_BYTES), stdin=newer)
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()

    cluster.start(3, 0)
    cluster.wait_members(2)
    cluster.wait_status(WAIT_FOR_JOIN)
    cluster.start(1)
    cluster.wait_members(3)
    time.sleep(1.0)  # nothing may happen: three nodes, but not those of the last epoch
    cluster.wait_status(WAIT_FOR_JOIN)
    nobody_takes_it_for_empty(cluster)
    cluster.start(2)
    cluster.wait_members(4)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    assert [contents(cluster, node) for node in range(4)] == [newer] * 4
    assert len(epochs(cluster, 3)[0].split(", ")) == 4, "the fourth is a member again, in an epoch of its own"


def nobody_takes_it_for_empty(cluster: Cluster) -> None:
    """What the missing member has is not known, so nothing is listed, checked or formatted as if there were nothing."""
    for words in ("vdi list", "vdi list -r", "vdi tree", "vdi lock list", "vm list", "cluster check"):
        told = cluster.try_dog(*words.split())
        assert (told.returncode != 0, told.stderr.decode()) == (True, WAITING_TEXT.partition(": ")[2] + "\n"), words
    asked = cluster.try_dog("cluster", "format", "-c", "2")
    assert (asked.returncode, "The cluster is not empty" in asked.stdout.decode()) == (0, True)
    cluster.wait_status(WAIT_FOR_JOIN)


def record_alone(cluster: Cluster, node: int, members: Sequence[int]) -> None:
    """The node, which is down, has recorded what the others did, and one epoch more, with these members."""
    log = f"{cluster.store(node)}/epoch"
    for path in sorted((cluster.store(0) / "epoch").iterdir()):
        shutil.copy(path, log)
    last = decode_epoch(read_file(RealDisk(), str(path)) or b"", str(path))
    every = decode_epoch(read_file(RealDisk(), f"{log}/00000001") or b"", log).members
    more = EpochRecord(Epoch(last.epoch + 1), last.began_s + 1, tuple(every[member] for member in members))
    write_file(RealDisk(), log, f"{more.epoch:08d}", encode_epoch(more))


def test_a_newer_epoch_is_refused_unless_it_never_began(new_cluster: Callable[..., Cluster]) -> None:
    """As when power fails everywhere at the join of a node that alone has recorded it."""
    cluster = started(new_cluster(3))
    data = filled(cluster)
    for members, joins in (((0, 1, 2), True), ((2,), False)):
        cluster.kill(2)
        cluster.wait_members(2)
        cluster.wait_recovered()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at the same time: neither is alone for an epoch
            cluster.kill(0, number)
            cluster.kill(1, number)
        record_alone(cluster, 2, members)
        cluster.start(0, 1)
        cluster.wait_status(RUNNING)
        if joins:
            cluster.start(2)
            cluster.wait_members(3)
            cluster.wait_recovered()
            assert len({tuple(epochs(cluster, node)) for node in range(3)}) == 1
            assert contents(cluster, 2) == data
    assert re.match(
        r"failed to join Sheepdog: its epoch \d+ is newer than the cluster's \d+; it may hold what the others lack: "
        "shut them down and start all nodes together",
        cluster.start_fails(2),
    )
    assert contents(cluster, 1) == data


def test_acknowledged_writes_survive_a_kill_of_everybody(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3))
    data = filled(cluster)
    for node in range(3):
        cluster.kill(node)
    cluster.start(1, 2, 0)
    cluster.wait_members(3)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    assert [contents(cluster, node) for node in range(3)] == [data] * 3


def test_a_busy_volume_and_a_kill_of_everybody(new_cluster: Callable[..., Cluster]) -> None:
    """Nodes die one after the other in the middle of a write: afterwards every node gives the same bytes, for good."""
    cluster = started(new_cluster(3))
    old = filled(cluster)
    new = trees.pattern(3, VOLUME_BYTES)
    writer = threading.Thread(
        target=lambda: cluster.try_dog("vdi", "write", "data", "0", str(VOLUME_BYTES), stdin=new, seconds=60)
    )
    writer.start()
    time.sleep(0.3)  # somewhere in the write; the promise holds at every instant
    for node in (2, 0, 1):
        cluster.kill(node)
    writer.join(70)
    assert not writer.is_alive()
    cluster.start()
    cluster.wait_members(3)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    first = contents(cluster, 0)
    assert contents(cluster, 1) == first
    assert contents(cluster, 2) == first
    for start in range(0, VOLUME_BYTES, 4096):
        block = first[start : start + 4096]
        assert block in (old[start : start + 4096], new[start : start + 4096]), f"block at {start} is neither"


def test_a_node_that_was_never_formatted_waits(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(1)
    cluster.start()
    cluster.wait_members(1, [0])
    assert native.status(cluster.socket(0)) == WAIT_FOR_FORMAT
    failed = cluster.try_dog("vdi", "create", "early", "4M")
    assert failed.returncode == 1
    assert failed.stderr == b"Failed to create VDI early: Waiting for cluster to be formatted\n"
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
