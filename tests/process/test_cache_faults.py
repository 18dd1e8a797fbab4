"""The object cache's disk full, or failing, under a running gateway: nobody is shown older data, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from tests.support.cluster import Cluster
from tests.support.errors import Injection
from tests.support.processes import run, wait_until

from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.errors import SheepError

MIB = 1 << 20
SIZE = 32 * MIB
DISK_MIB = 24  # beside the cache's journal there is room for half of the volume
OWNER, OTHER = 0, 1
SECONDS = 30.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and strace need root")


def unmounted(path: Path) -> bool:
    return not run(["umount", path], check=False).returncode


class Machines(Cluster):
    """Two nodes; the first has a cache, on a small file system in memory of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(2, directory)
        self.cache = directory / "cache"

    def begin(self, *nodes: int) -> None:
        self.start(*nodes, extra={OWNER: ("-w", f"object:size=64M,dir={self.cache}")})
        self.wait_members(2)

    def restart_owner(self) -> None:
        self.kill(OWNER)
        self.wait_members(1, [OTHER])
        self.begin(OWNER)

    def opened(self, node: int = OWNER) -> BlockingVolume:
        return BlockingVolume.open(("127.0.0.1", self.port(node)), "guest", object_cache=True)

    def contents(self, node: int) -> bytes:
        return self.try_dog("vdi", "read", "guest", node=node, check=True).stdout

    def volumes(self) -> list[dict[str, int]]:
        found: list[dict[str, int]] = json.loads(self.dog("vdi", "cache", "info", "--json", node=OWNER))["volumes"]
        return found


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    cluster = Machines(tmp_path_factory.mktemp("cache"))
    cluster.cache.mkdir()
    with ExitStack() as stack:
        run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}M", "tmpfs", cluster.cache])
        stack.callback(wait_until, partial(unmounted, cluster.cache), SECONDS, f"umount {cluster.cache}")
        stack.callback(cluster.close)
        cluster.begin()
        cluster.format("-c", "2")
        yield cluster


@pytest.fixture
def cluster(machines: Machines) -> Iterator[Machines]:
    """There is a volume whose objects all exist, cached by the first node and nowhere dirty."""
    machines.dog("vdi", "create", "-P", "guest", str(SIZE))
    volume = machines.opened()
    for offset in range(0, SIZE, 4 * MIB):
        volume.write(offset, bytes(4096))
    wait_until(lambda: bool(volume.read(0, 4096)) and bool(machines.volumes()), SECONDS, "the claim")
    for offset in range(0, SIZE, 4 * MIB):
        volume.write(offset, bytes(4096))
    volume.flush()
    volume.close()
    yield machines
    machines.restart_owner()
    machines.dog("vdi", "delete", "guest", node=OTHER)


def test_a_full_cache_disk_sends_writes_to_the_cluster(cluster: Machines) -> None:
    data = random.Random(1).randbytes(SIZE)
    volume = cluster.opened()
    for offset in range(0, SIZE, 64 << 10):  # twice what the disk takes; nobody flushes
        volume.write(offset, data[offset : offset + (64 << 10)])
    somebody_elses = cluster.cache / "somebody-elses"
    with open(somebody_elses, "wb", buffering=0) as out:  # takes what is left, also from the room kept for checkpoints
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
    changed = bytearray(data)
    for offset in range(0, SIZE, 3 * MIB):
        changed[offset : offset + 4096] = os.urandom(4096)
        volume.write(offset, changed[offset : offset + 4096])
    assert "a write goes to the cluster" in cluster.log(OWNER).read_text()
    assert b"".join(bytes(volume.read(offset, MIB)) for offset in range(0, SIZE, MIB)) == changed
    volume.close()
    somebody_elses.unlink()
    cluster.restart_owner()  # by kill -9: what was not pushed is still here
    assert cluster.contents(OTHER) == changed


def test_a_replica_dies_during_a_push(cluster: Machines) -> None:
    """The flush ends once what is dirty is on what is left; the replica gets it when it is back."""
    data = bytearray(SIZE)
    volume = cluster.opened()
    for offset in range(0, SIZE, 32 << 10):  # every eighth block: each is a push of its own
        data[offset : offset + 4096] = os.urandom(4096)
        volume.write(offset, data[offset : offset + 4096])
    dirty = cluster.volumes()[0]["dirty"]
    flushing = Thread(target=volume.flush)
    flushing.start()
    wait_until(lambda: cluster.volumes()[0]["dirty"] < dirty, SECONDS, "the push")
    cluster.kill(OTHER)
    flushing.join(SECONDS)
    assert not flushing.is_alive() and not cluster.volumes()[0]["dirty"]
    cluster.begin(OTHER)
    cluster.wait_recovered()
    assert cluster.contents(OTHER) == data
    volume.close()


def cached_file(cluster: Machines) -> Path:
    """The file of the volume's first object in the cache."""
    return min(path for path in (cluster.cache / "obj").iterdir() if path.name.endswith("00000000"))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("calls", ["pwrite64", "preadv,preadv2"])
def test_an_error_of_the_cache_disk_hides_nothing(cluster: Machines, calls: str) -> None:
    """Until that sheep has been started again: what is there and nowhere else is an error, what is not is served."""
    volume = cluster.opened()
    volume.read(4 * MIB, MIB)
    volume.write(8 * MIB, b"pushed".ljust(4096))
    volume.flush()
    volume.write(4096, b"dirty".ljust(4096))
    with Injection(cluster.pids(OWNER)[-1], cached_file(cluster), calls, "EIO") as injection:
        if calls == "pwrite64":
            with pytest.raises(SheepError):
                volume.write(8192, b"last".ljust(4096))
        with pytest.raises(SheepError):
            volume.read(4096, 4096)
        assert injection.injected()
    assert volume.read(8 * MIB, 4096) == b"pushed".ljust(4096)
    assert volume.read(4 * MIB, MIB) == bytes(MIB)
    volume.write(12 * MIB, b"past the cache".ljust(4096))
    with pytest.raises(SheepError):
        volume.flush()
    refused = cluster.try_dog("vdi", "read", "guest", "4096", "4096", node=OTHER)
    assert refused.returncode and not refused.stdout
    with pytest.raises(SheepError):
        volume.close()  # which flushes
    cluster.restart_owner()
    expected = {4096: b"dirty", 8 * MIB: b"pushed", 12 * MIB: b"past the cache"}
    found = cluster.contents(OTHER)
    assert {offset: found[offset : offset + 4096].rstrip() for offset in expected} == expected
