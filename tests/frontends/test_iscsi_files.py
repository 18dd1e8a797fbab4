"""The sheepfs of an exporting host: what it exports is locked, and its successor gets the lock of one that died."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster, with_locks
from tests.support.processes import having_argument, run, send_signal, wait_ended

from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.iscsi.files import Files

SECONDS = 20.0
BLOCK = 4096


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return with_locks(new_cluster(2))


@pytest.fixture
def hosts(cluster: Cluster, tmp_path: Path) -> Iterator[list[Files]]:
    """Two, each beside a sheep of its own."""
    needs.fuse()
    needs.root()
    made = [Files(f"host{node}", ("127.0.0.1", cluster.port(node)), tmp_path / "run") for node in (0, 1)]
    try:
        yield made
    finally:
        for files in made:
            for volume in files.shown():
                files.hide(volume)
            files.stop()


def die(files: Files) -> None:
    pids = having_argument(str(files.place))
    assert pids
    for pid in pids:
        send_signal(pid, signal.SIGKILL)
    wait_ended(pids, SECONDS, "sheepfs")
    assert not files.is_alive()


def test_one_host_at_a_time_and_again_after_its_sheepfs_has_died(cluster: Cluster, hosts: list[Files]) -> None:
    first, second = hosts
    for files in hosts:
        files.start()
    first.show("v")
    first.path("v").write_bytes(b"data")
    with pytest.raises(
        UsageError, match=r"^somebody else has it open \(dog vdi lock list; dog vdi lock unlock v frees"
    ):
        second.show("v")
    die(first)
    with pytest.raises(UsageError, match="somebody else has it open"):
        second.show("v")  # what the dead one has left keeps others out
    first.start()
    assert first.show("v") == 16 << 20
    assert first.path("v").read_bytes()[:4] == b"data"
    first.hide("v")
    second.show("v")

    die(first)
    first.start()
    with pytest.raises(UsageError, match="somebody else has it open"):
        first.show("v")  # what it remembers is not this lock
    assert os.listdir(second.place / "volume") == ["v"]


@pytest.mark.parametrize("shared", [False, True])
def test_qemu_does_not_open_what_a_host_exports(cluster: Cluster, hosts: list[Files], shared: bool) -> None:
    """QEMU 5.2's own driver, by another sheep: refused while the volume is exported, alone or shared."""
    qemu_io = needs.qemu52("qemu-io")
    files = hosts[0]

    def opened(*command: str) -> subprocess.CompletedProcess[bytes]:
        return run([qemu_io, "-f", "raw", "-c", *command, f"sheepdog://127.0.0.1:{cluster.port(1)}/v"], check=False)

    files.start()
    files.show("v", shared=shared)
    files.path("v").write_bytes(b"a" * BLOCK)
    refused = opened(f"write -P 0x62 0 {BLOCK}")
    assert refused.returncode != 0
    assert b"VDI is already locked" in refused.stderr
    assert files.path("v").read_bytes()[:BLOCK] == b"a" * BLOCK
    files.hide("v")
    assert opened(f"read -P 0x61 0 {BLOCK}").returncode == 0
