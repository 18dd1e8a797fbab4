"""Two of Debian's tgtd offer one volume through two gateways of a cluster that enforces locks (multipath)."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster, started
from tests.support.netns import NetworkNamespace
from tests.support.processes import environment, run, wait_until

NAME = "iqn.2026-01.example:shared"
MIB = 1 << 20
PORTALS = (9862, 9863)


class Way:
    """One tgtd: a path to the volume, through the gateway `node`."""

    def __init__(self, network: NetworkNamespace, cluster: Cluster, node: int, log: Path) -> None:
        self.network = network
        self.control = cluster.port(node)
        self.uri = f"iscsi://127.0.0.1:{PORTALS[node]}/{NAME}/1"
        self.backing = f"unix:{cluster.socket(node)}:disk"
        Path("/run/tgtd").mkdir(exist_ok=True)
        portal = f"portal=127.0.0.1:{PORTALS[node]}"
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [*network.enter, "tgtd", "-f", "--iscsi", portal, "-C", str(self.control)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(),
            )  # fmt: skip

    def admin(self, *words: str, check: bool = True) -> bool:
        command = [*self.network.enter, "tgtadm", "-C", str(self.control), "--lld", "iscsi", *words]
        return run(command, check=check).returncode == 0

    def offer(self) -> None:
        wait_until(lambda: self.admin("--op", "show", "--mode", "sys", check=False), 20, "tgtd answers")
        self.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", NAME)
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
        self.admin("--op", "new", *unit, "--bstype", "sheepdog", "-b", self.backing)
        self.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def io(self, *commands: str) -> None:
        """qemu-io commands; a pattern that does not verify fails the test."""
        script = [part for command in commands for part in ("-c", command)]
        done = run([*self.network.enter, "qemu-io", "-f", "raw", *script, self.uri])
        output = (done.stdout + done.stderr).decode().lower()
        assert "failed" not in output, output
        assert "error" not in output, output

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for name in (f"/run/tgtd/socket.{self.control}", f"/run/tgtd/socket.{self.control}.lock"):
            Path(name).unlink(missing_ok=True)


@pytest.fixture
def paths(
    directory: Path, teardown: ExitStack, request: pytest.FixtureRequest, new_cluster: Callable[..., Cluster]
) -> tuple[Cluster, list[Way]]:
    needs.network_namespaces()
    needs.program("tgtd", "tgtadm", "qemu-io")
    network: NetworkNamespace = request.getfixturevalue("private_network")
    cluster = started(new_cluster(3, prefix=network.enter))
    cluster.format("-l", "-c", "2")
    cluster.dog("vdi", "create", "disk", "64M")
    made = []
    for node in range(2):
        path = Way(network, cluster, node, directory / f"tgtd{node}.log")
        teardown.callback(path.close)
        path.offer()
        made.append(path)
    return cluster, made


def sharers(cluster: Cluster) -> dict[int, str]:
    """State of the path through each node, as `dog vdi lock list` shows it."""
    row = cluster.dog("vdi", "lock", "list").splitlines()[1]
    return {
        node: row.partition(f"port:{cluster.port(node)}(")[2].partition(")")[0]
        for node in range(3)
        if f"port:{cluster.port(node)}(" in row
    }


def test_what_goes_in_by_one_path_comes_out_by_the_other(paths: tuple[Cluster, list[Way]]) -> None:
    cluster, (one, other) = paths
    assert set(sharers(cluster)) == {0, 1}
    chance = random.Random(3)
    for pattern, index in enumerate(chance.sample(range(1, 16), 8), 1):
        offset = index * 4 * MIB + chance.randrange(1000) * 4096
        writer, reader = chance.sample((one, other), 2)
        writer.io(f"write -P {pattern} {offset} 65536", "flush")
        assert "modified" in sharers(cluster).values()
        reader.io(f"read -P {pattern} {offset} 65536")
    one.io("write -P 9 0 4096")
    assert sharers(cluster) == {0: "modified", 1: "invalidated"}
    cluster.dog("vdi", "snapshot", "-s", "now", "disk")
    one.io("write -P 10 0 4096", "flush")
    other.io("read -P 10 0 4096", "write -P 11 4096 4096", "flush")
    one.io("read -P 10 0 4096", "read -P 11 4096 4096")
    assert cluster.try_dog("vdi", "read", "-s", "now", "disk", "0", "4096", node=2, check=True).stdout == b"\x09" * 4096
    cluster.kill(1)
    wait_until(lambda: set(sharers(cluster)) == {0}, 30, "the dead node shares the lock no more")
    one.io("write -P 12 8192 4096", "flush", "read -P 12 8192 4096", "read -P 11 4096 4096")
