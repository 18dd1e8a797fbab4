"""QEMU 5.2 at a gateway with an object cache: which of its cache modes use it, and that nothing is lost or old."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread

import pytest
from tests.frontends.test_qemu52 import MIB, OBJECT, qemu_img, qemu_io
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.processes import wait_until

CACHE = ("-w", "object:size=64M")
OWNER, OTHER = 0, 2
ANSWER_S = 60.0
DIRTY = [(7, 0, 4096), (8, 8192, 65536), (9, OBJECT + 4096, 4096)]  # pattern, offset, length


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = new_cluster(3)
    cluster.start(extra={OWNER: CACHE})
    cluster.wait_members(3)
    cluster.format("-c", "3")
    return cluster


@pytest.fixture
def uri(cluster: Cluster) -> Callable[[str], str]:
    def by_tcp(name: str) -> str:
        return f"sheepdog://127.0.0.1:{cluster.port(OWNER)}/{name}"

    return by_tcp


def info(cluster: Cluster) -> dict[str, int]:
    """The numbers of the cache."""
    found = json.loads(cluster.dog("vdi", "cache", "info", "--json", node=OWNER))
    return {key: value for key, value in found.items() if isinstance(value, int)}


def elsewhere(cluster: Cluster, name: str, offset: int, length: int) -> bytes:
    """What another gateway says."""
    return cluster.try_dog("vdi", "read", name, str(offset), str(length), node=OTHER, check=True).stdout


class Shell:
    """A qemu-io that stays: a guest that has its disk open. It takes one command at a time."""

    def __init__(self, target: str, mode: str = "writeback") -> None:
        # by lines, else what it says would come at its end
        command = ["stdbuf", "-oL", needs.qemu52("qemu-io"), "-f", "raw", "-t", mode, target]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def do(self, *commands: str) -> None:
        """Reads and writes, each to its end; one that fails fails the test."""
        for command in commands:
            self.say(command)
            while " ops; " not in (line := self._lines.get(timeout=ANSWER_S)):
                assert not any(sign in line for sign in ("verification failed", "read failed", "write failed")), line

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def shell(target: str, mode: str = "writeback") -> Iterator[Shell]:
    started = Shell(target, mode)
    try:
        yield started
    finally:
        started.end()


def begin(guest: Shell, cluster: Cluster) -> None:
    """The first requests still go past the cache, until all nodes know whose the volume is."""

    def is_cached() -> bool:
        guest.do("read -P 1 0 512")
        return info(cluster)["misses"] > 0

    wait_until(is_cached, ANSWER_S, "the claim")


@pytest.mark.parametrize(("mode", "cached"), [("writeback", True), ("writethrough", True), ("none", False)])
def test_which_modes_use_the_cache(uri: Callable[[str], str], cluster: Cluster, mode: str, cached: bool) -> None:
    """QEMU 5.2 does writethrough by a flush after each write; what it flushes is in the cache none the less."""
    qemu_img("create", "-q", "-f", "raw", uri("disk"), "16M")
    qemu_io(uri("disk"), f"write -P 1 0 {2 * OBJECT}", "flush", cache=mode)
    writes = [f"write -P {pattern} {offset} {length}" for pattern, offset, length in DIRTY]
    reads = [f"read -P {pattern} {offset} {length}" for pattern, offset, length in DIRTY]
    with shell(uri("disk"), mode) as guest:
        if cached:
            begin(guest, cluster)
        guest.do(*writes, *reads, "read -P 1 4096 4096")
        guest.say("flush")
        wait_until(lambda: not info(cluster)["dirty"], ANSWER_S, "the flush")
    qemu_io(uri("disk"), *reads, cache=mode)
    numbers = info(cluster)
    assert bool(numbers["local_writes"]) == bool(numbers["hits"]) == cached, numbers
    for pattern, offset, length in DIRTY:
        assert elsewhere(cluster, "disk", offset, length) == bytes([pattern]) * length
    qemu_io(uri("disk"), *reads, cache=mode, read_only=True)


def test_a_guest_goes_on_with_its_dirty_data_when_its_sheep_died(uri: Callable[[str], str], cluster: Cluster) -> None:
    """QEMU connects again, and finds what it wrote and had not flushed; then it flushes."""
    qemu_img("create", "-q", "-f", "raw", uri("disk"), "16M")
    qemu_io(uri("disk"), f"write -P 1 0 {2 * OBJECT}", "flush")
    with shell(uri("disk")) as guest:
        begin(guest, cluster)
        guest.do(*(f"write -P {pattern} {offset} {length}" for pattern, offset, length in DIRTY))
        cluster.kill(OWNER)
        cluster.wait_members(2, [1, 2])
        cluster.start(OWNER, extra={OWNER: CACHE})
        cluster.wait_members(3)
        guest.do(*(f"read -P {pattern} {offset} {length}" for pattern, offset, length in DIRTY))
        assert info(cluster)["hits"], "they came from the cache"
        guest.say("flush")
        wait_until(lambda: not info(cluster)["dirty"], ANSWER_S, "the flush")
        for pattern, offset, length in DIRTY:
            assert elsewhere(cluster, "disk", offset, length) == bytes([pattern]) * length


def test_snapshots_and_resize_have_what_was_dirty(uri: Callable[[str], str], cluster: Cluster) -> None:
    qemu_img("create", "-q", "-f", "raw", uri("disk"), "16M")
    qemu_io(uri("disk"), f"write -P 1 0 {2 * OBJECT}", "flush")
    with shell(uri("disk")) as guest:
        begin(guest, cluster)
        guest.do("write -P 2 4096 4096")
        assert info(cluster)["dirty"]
        cluster.dog("vdi", "snapshot", "-s", "first", "disk", node=OTHER)
        guest.do("write -P 3 4096 4096", "read -P 3 4096 4096")
        assert elsewhere(cluster, "disk", 4096, 4096) == b"\3" * 4096, "another gateway has it pushed first"
        guest.do("read -P 3 4096 4096", "read -P 1 0 512")
    qemu_io(uri("disk#first"), "read -P 2 4096 4096", f"read -P 1 8192 {MIB}", read_only=True)
    qemu_img("resize", "-q", "-f", "raw", uri("disk"), "20M")
    qemu_io(uri("disk"), "read -P 3 4096 4096", f"read -P 0 {16 * MIB} {4 * MIB}", read_only=True)
