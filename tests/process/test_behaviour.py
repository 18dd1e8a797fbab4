"""Cluster-wide behaviour that scripts and people rely on (cli.md 4), seen with the tools that they use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.cluster import WAIT_FOR_JOIN, Cluster, started
from tests.support.processes import run, wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
WAIT_S = 60.0


def failed(cluster: Cluster, *words: str, node: int = 0, stdin: bytes = b"") -> tuple[int, list[str]]:
    """Exit status and stderr of a command."""
    done = cluster.try_dog(*words, node=node, stdin=stdin)
    return done.returncode, done.stderr.decode().splitlines()


def write(cluster: Cluster, name: str, data: bytes, offset: int = 0, node: int = 0) -> None:
    cluster.dog("vdi", "write", name, str(offset), str(len(data)), stdin=data, node=node)


def read(cluster: Cluster, name: str, size: int, node: int = 0) -> bytes:
    return cluster.try_dog("vdi", "read", name, "0", str(size), node=node, check=True).stdout


def epochs(cluster: Cluster, node: int = 0) -> list[str]:
    return cluster.dog("cluster", "info", "-r", node=node).splitlines()[2:]


def test_strict_mode(new_cluster: Callable[..., Cluster]) -> None:
    """With fewer zones than copies writes and creations fail, reads work; the flag survives a shutdown."""
    cluster = started(new_cluster(3))
    cluster.format("-c", "3", "-t")
    cluster.dog("vdi", "create", "v", "8M")
    data = os.urandom(OBJECT)
    write(cluster, "v", data)
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    cluster.start()
    cluster.wait_members(3)
    cluster.wait_status(0)
    cluster.kill(2)
    cluster.wait_members(2, (0, 1))
    halted = "IO has halted as there are not enough living nodes"
    assert failed(cluster, "vdi", "write", "v", "0", "4", stdin=b"more") == (1, [halted, "Failed to write VDI"])
    assert failed(cluster, "vdi", "create", "new", "1M") == (
        1, ["Failed to create VDI new: Failed to write to requested VDI"],
    )  # fmt: skip
    assert read(cluster, "v", OBJECT) == data
    assert cluster.dog("cluster", "info").startswith("Cluster status: running, ")
    cluster.start(2)
    cluster.wait_members(3)
    write(cluster, "v", b"more")


def test_manual_recovery(new_cluster: Callable[..., Cluster]) -> None:
    """Disabled, a change of membership makes an epoch and moves nothing; enabled again, the rest moves at once."""
    cluster = started(new_cluster(4))
    cluster.format("-c", "2")
    cluster.dog("vdi", "create", "v", "64M")
    data = os.urandom(64 * MIB)
    write(cluster, "v", data)
    assert cluster.dog("cluster", "recover", "disable") == "Cluster recovery: disable\n"
    assert cluster.dog("cluster", "info").startswith("Cluster status: running, auto-recovery disabled\n")
    cluster.kill(3)
    cluster.wait_members(3, (0, 1, 2))
    assert len(epochs(cluster)) == 2
    missing = cluster.try_dog("vdi", "check", "-e", "v")
    assert missing.returncode == 1
    lost = int(missing.stdout.decode().splitlines()[-1].split()[2])
    assert lost > 4, missing.stdout
    index = next(
        number for number in range(16)
        if sum(f"oid {vid_of(cluster, 'v'):08x}{number:08x} " in line for line in missing.stdout.decode().splitlines())
    )  # fmt: skip
    write(cluster, "v", b"touched", index * OBJECT)  # what is written is recovered
    fewer = cluster.try_dog("vdi", "check", "-e", "v").stdout.decode().splitlines()
    assert int(fewer[-1].split()[2]) == lost - 1
    assert cluster.dog("cluster", "recover", "enable") == "Cluster recovery: enable\n"
    wait_until(
        lambda: cluster.try_dog("vdi", "check", "-e", "v").returncode == 0, WAIT_S, "every object on two nodes again"
    )
    assert len(epochs(cluster)) == 2, "no epoch of its own"
    assert read(cluster, "v", OBJECT * index) == data[: OBJECT * index]


def vid_of(cluster: Cluster, name: str) -> int:
    return int(cluster.dog("vdi", "list", "-r", name).splitlines()[-1].split(" ")[7], 16)


def test_small_vdi_ids(new_cluster: Callable[..., Cluster]) -> None:
    """`format -R`: ids from 1 on, the lowest free one first, also those of families that are deleted altogether.

    A name whose snapshots are left cannot begin anew.
    """
    cluster = started(new_cluster(1))
    cluster.format("-c", "1", "-R")

    def ids(*words: str) -> list[tuple[str, int]]:
        rows = [row.split(" ") for row in cluster.dog("vdi", "list", "-r", *words).splitlines()]
        return [(row[1], int(row[7], 16)) for row in rows]

    for name in ("test", "other", "third"):
        cluster.dog("vdi", "create", name, "4M")
    assert ids() == [("test", 1), ("other", 2), ("third", 3)]
    write(cluster, "test", b"data")
    cluster.dog("vdi", "snapshot", "-s", "t", "test")
    assert ids("test") == [("test", 1), ("test", 4)]
    cluster.dog("vdi", "clone", "-s", "t", "test", "clone")
    assert ids("clone") == [("clone", 5)]
    cluster.dog("vdi", "delete", "test")
    assert failed(cluster, "vdi", "create", "test", "4M") == (1, ["Failed to create VDI test: VDI exists already"])
    for words in (("-s", "t", "test"), ("other",), ("clone",)):
        cluster.dog("vdi", "delete", *words)
    wait_until(lambda: list(cluster.objects(0)) == ["8000000300000000"], WAIT_S, "the end of all that was deleted")
    assert ids("third") == [("third", 3)]
    cluster.dog("vdi", "create", "test", "4M")
    assert ids() == [("test", 1), ("third", 3)]
    assert ids("nosuch") == []


@pytest.mark.timeout(240)
def test_who_may_join(new_cluster: Callable[..., Cluster], directory: Path) -> None:
    """A store of another cluster and another strategy of virtual nodes are refused; the cluster stays as it is."""
    cluster = new_cluster(4)
    cluster.start(0, 1)
    cluster.wait_members(2, (0, 1))
    cluster.format("-c", "2")
    cluster.dog("vdi", "create", "v", "4M")
    # Node 2 was formatted elsewhere.
    own, cluster.driver = cluster.driver, f"local:{directory}/elsewhere"
    cluster.start(2)
    cluster.wait_members(1, (2,))
    cluster.dog("cluster", "format", "-c", "1", node=2)
    cluster.kill(2, signal.SIGTERM)
    cluster.driver = own
    for node, extra in ((2, ()), (3, ("-V", "64"))):
        refused = run([*cluster.command(node, extra), "-f"], check=False)
        assert refused.returncode == 1
        assert "failed to join Sheepdog" in cluster.log(node).read_text()
    assert [row.split()[1] for row in cluster.dog("node", "list", "-r").splitlines()] == [
        f"127.0.0.1:{cluster.port(node)}" for node in (0, 1)
    ]
    write(cluster, "v", b"goes on")
    cluster.start(3, extra={3: ("-g",)})
    cluster.wait_members(3, (0, 1, 3))  # gateways may always come


@pytest.mark.timeout(240)
def test_other_addresses_after_a_shutdown(new_cluster: Callable[..., Cluster]) -> None:
    """Nodes with another -y are other members: they wait for those of the last epoch, until force; data is kept."""
    cluster = started(new_cluster(2))
    cluster.format("-c", "2")
    cluster.dog("vdi", "create", "v", "8M")
    data = os.urandom(8 * MIB)
    write(cluster, "v", data)
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    cluster.start(extra={node: ("-y", f"127.0.0.{node + 2}") for node in range(2)})
    cluster.wait_members(2)
    cluster.wait_status(WAIT_FOR_JOIN)
    assert cluster.dog("cluster", "info").startswith("Cluster status: Waiting for other nodes to join cluster\n")
    waiting = cluster.try_dog("vdi", "create", "w", "4M")
    assert (waiting.returncode, waiting.stderr) == (
        1, b"Failed to create VDI w: Waiting for other nodes to join cluster\n",
    )  # fmt: skip
    cluster.dog("cluster", "recover", "force", "-f")
    cluster.wait_status(0)
    cluster.wait_recovered()
    assert [row.split()[1] for row in cluster.dog("node", "list", "-r").splitlines()] == [
        f"127.0.0.{node + 2}:{cluster.port(node)}" for node in range(2)
    ]
    for node in range(2):
        assert read(cluster, "v", 8 * MIB, node) == data
    assert len(epochs(cluster)) == 2
