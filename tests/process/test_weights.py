"""How much of the ring a node gets: fixed numbers of virtual nodes (-V), and space published anew (reweight)."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.cluster import Cluster, started
from tests.support.processes import wait_until

WAIT_SECONDS = 30.0


def vnodes(cluster: Cluster, node: int = 0) -> list[int]:
    return [int(line.split(" ")[2]) for line in cluster.dog("node", "list", "-r", node=node).splitlines()]


def epochs(cluster: Cluster) -> list[str]:
    """What changed from epoch to epoch, newest first."""
    lines = cluster.dog("cluster", "info", "-d", "-r").splitlines()
    return [line.split(" ", 2)[2] for line in lines[2:]]


def test_fixed_numbers_are_remembered_and_changed(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(2)
    cluster.start(extra={0: ("-V", "50"), 1: ("-V", "70")})
    cluster.wait_members(2)
    refused = cluster.try_dog("cluster", "format", "-c", "2")
    assert refused.returncode == 1 and b"Need to specify the option of '-V'" in refused.stderr
    cluster.dog("cluster", "format", "-c", "2", "-V")
    assert vnodes(cluster) == [50, 70]
    assert "vnodes strategy: fixed" in cluster.dog("cluster", "info", "-v")
    cluster.dog("vdi", "create", "v", "40M")
    data = bytes(range(256)) * (10 << 12)
    cluster.dog("vdi", "write", "v", "0", str(len(data)), stdin=data)

    cluster.dog("node", "vnodes", "set", "60")
    assert vnodes(cluster) == vnodes(cluster, 1) == [60, 70]
    assert epochs(cluster) == ["[]", "[formated]"]
    cluster.wait_recovered()
    assert cluster.try_dog("vdi", "read", "v", "0", str(len(data)), check=True).stdout == data

    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    assert "previous vnodes:60" in cluster.start_fails(0, ("-V", "50"))
    cluster.start(extra={0: ("-V", "60"), 1: ("-V", "70")})
    cluster.wait_members(2)
    cluster.wait_status(0)
    assert vnodes(cluster) == [60, 70]
    assert len(epochs(cluster)) == 2, "the same as before"


def test_vnodes_of_an_automatic_cluster_are_not_set(new_cluster: Callable[..., Cluster]) -> None:
    """... but its nodes publish their space when they are asked to, each with an epoch of its own."""
    cluster = started(new_cluster(3))
    cluster.format("-c", "2")
    refused = cluster.try_dog("node", "vnodes", "set", "60")
    assert (refused.returncode, refused.stderr) == (255, b"Failed to execute request\n")
    cluster.dog("cluster", "reweight")
    wait_until(lambda: epochs(cluster) == ["[]", "[]", "[]", "[formated]"], WAIT_SECONDS, "an epoch for each node")
    assert sum(vnodes(cluster)) in range(3 * 128 - 2, 3 * 128 + 3)
