"""Debian's tgtd with its own sheepdog backing store: an iSCSI target that nobody here wrote, in a private network."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support import needs, trees
from tests.support.cluster import Cluster, started
from tests.support.netns import NetworkNamespace
from tests.support.processes import environment, run, wait_until

PORTAL = 9860  # inside the private network: nobody else is there
NAME = "iqn.2026-01.example:volume"
MIB = 1 << 20


class Target:
    """One tgtd with one target, one logical unit on a volume, reached as `uri`."""

    uri = f"iscsi://127.0.0.1:{PORTAL}/{NAME}/1"

    def __init__(self, network: NetworkNamespace, control: int, log: Path) -> None:
        self.network = network
        self.control = control
        Path("/run/tgtd").mkdir(exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [*network.enter, "tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{PORTAL}", "-C", str(control)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(),
            )  # fmt: skip

    def admin(self, *words: str) -> str:
        command = [*self.network.enter, "tgtadm", "-C", str(self.control), "--lld", "iscsi", *words]
        return run(command).stdout.decode()

    def offer(self, backing: str) -> None:
        """Makes the target with logical unit 1 on `backing`, open to every initiator of this network."""
        wait_until(self.answers, 20, "tgtd answers")
        self.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", NAME)
        self.add_unit(backing)
        self.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def add_unit(self, backing: str) -> None:
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
        self.admin("--op", "new", *unit, "--bstype", "sheepdog", "-b", backing)

    def answers(self) -> bool:
        shown = run(
            [*self.network.enter, "tgtadm", "-C", str(self.control), "--op", "show", "--mode", "sys"], check=False
        )
        return shown.returncode == 0

    def withdraw(self) -> None:
        self.admin("--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", "1")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for name in (f"/run/tgtd/socket.{self.control}", f"/run/tgtd/socket.{self.control}.lock"):
            Path(name).unlink(missing_ok=True)


class Disk(NamedTuple):
    """A volume `disk` of three nodes, offered by tgtd."""

    cluster: Cluster
    target: Target


@pytest.fixture(params=["tcp", "unix"])
def disk(request: pytest.FixtureRequest, directory: Path, teardown: ExitStack) -> Disk:
    """tgtd reaches node 0 by each transport that it knows."""
    needs.network_namespaces()
    needs.program("tgtd", "tgtadm", "iscsi-inq", "iscsi-ls", "iscsi-readcapacity16", "qemu-io", "qemu-img")
    network: NetworkNamespace = request.getfixturevalue("private_network")
    cluster: Cluster = request.getfixturevalue("new_cluster")(3, prefix=network.enter)
    started(cluster).format()
    cluster.dog("vdi", "create", "disk", "64M")
    target = Target(network, cluster.port(0), directory / "tgtd.log")
    teardown.callback(target.close)
    if request.param == "tcp":
        target.offer(f"tcp:127.0.0.1:{cluster.port(0)}:disk")
    else:
        target.offer(f"unix:{cluster.socket(0)}:disk")
    return Disk(cluster, target)


def initiator(disk: Disk, *command: str | Path) -> str:
    """Output of an initiator's command inside the private network."""
    done = run([*disk.target.network.enter, *map(str, command)])
    return done.stdout.decode() + done.stderr.decode()


def qemu_io(disk: Disk, *commands: str) -> None:
    """Runs qemu-io commands; a pattern that does not verify, or any error, fails the test."""
    script = [part for command in commands for part in ("-c", command)]
    output = initiator(disk, "qemu-io", "-f", "raw", *script, Target.uri)
    for sign in ("verification failed", "error", "failed"):
        assert sign not in output.lower(), output


def test_initiators_see_the_volume(disk: Disk) -> None:
    assert NAME in initiator(disk, "iscsi-ls", f"iscsi://127.0.0.1:{PORTAL}")
    assert "Peripheral Device Type:DIRECT_ACCESS" in initiator(disk, "iscsi-inq", Target.uri)
    capacity = initiator(disk, "iscsi-readcapacity16", Target.uri)
    assert f"{64 * MIB}" in capacity, capacity


def test_patterns_come_back_and_dog_sees_them(disk: Disk) -> None:
    qemu_io(
        disk,
        "write -P 1 0 4096",
        "write -P 2 4194304 1048576",
        f"write -P 3 {8 * MIB - 8192} 16384",
        f"write -P 4 {64 * MIB - 512} 512",
        "write -P 5 1024 512",
        "flush",
        "read -P 1 0 1024",
        "read -P 5 1024 512",
        "read -P 1 1536 2560",
        "read -P 0 4096 65536",
        f"read -P 3 {8 * MIB - 8192} 16384",
        f"read -P 4 {64 * MIB - 512} 512",
    )
    seen = disk.cluster.try_dog("vdi", "read", "disk", "0", "4096", node=2, check=True).stdout
    assert seen == b"\1" * 1024 + b"\5" * 512 + b"\1" * 2560


def test_a_real_image_and_a_dying_node(disk: Disk, directory: Path) -> None:
    image = directory / "image.raw"
    image.write_bytes(trees.pattern(7, 20 * MIB + 512) + bytes(44 * MIB - 512))
    initiator(disk, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, Target.uri)
    disk.cluster.kill(2)
    initiator(disk, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, Target.uri)
    qemu_io(disk, f"write -P 9 {30 * MIB} {MIB}", "flush", f"read -P 9 {30 * MIB} {MIB}")


def test_benchmark_runs_to_its_end(disk: Disk) -> None:
    command = ("qemu-img", "bench", "-w", "-f", "raw", "-c", "500", "-d", "8", "-s", "4096", "--pattern", "66")
    assert "Run completed" in initiator(disk, *command, Target.uri)
    qemu_io(disk, f"read -P 66 0 {500 * 4096}", f"read -P 0 {500 * 4096} 4096")


def test_the_unit_can_be_taken_away_and_offered_again(disk: Disk) -> None:
    qemu_io(disk, f"write -P 6 0 {MIB}", "flush")
    disk.target.withdraw()
    disk.target.add_unit(f"unix:{disk.cluster.socket(1)}:disk")
    qemu_io(disk, f"read -P 6 0 {MIB}", f"write -P 7 {MIB} 4096", f"read -P 7 {MIB} 4096")
