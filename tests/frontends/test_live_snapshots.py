"""Snapshots of a volume that QEMU or tgt holds open and writes to: each is the volume at one instant, nothing is lost.

Both know the object map by heart. They learn of a snapshot when a write is refused (QEMU) or their map is invalidated
(tgt), create objects by the map that they had, and tell them to an inode that may have been frozen meanwhile.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from random import Random

import pytest
from tests.frontends.test_tgt import Target
from tests.support import needs
from tests.support.cluster import Cluster, started
from tests.support.netns import NetworkNamespace
from tests.support.processes import environment

MIB = 1 << 20
SIZE = 32 * MIB  # eight objects, none of which exists at first
BLOCK = 4096  # what a snapshot has whole or not at all
SPOTS = 48  # blocks that are written, all over the volume
DEPTH = 4  # writes under way together
SNAPSHOTS = 6
BATCHES_BETWEEN = 12
PROMPT = b"qemu-io> "


class RunningImage:
    """qemu-io with the image open, from one command to the next."""

    def __init__(self, command: list[str | Path]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
        )
        self._read()

    def do(self, *commands: str) -> None:
        """Until all have been done; any error fails the test."""
        assert self._process.stdin is not None
        for command in commands:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
            output = self._read()
            for sign in ("verification failed", "error", "failed"):
                assert sign not in output.lower(), output

    def _read(self) -> str:
        assert isinstance(self._process.stdout, BufferedReader)
        output = b""
        while not output.endswith(PROMPT):
            part = self._process.stdout.read1(65536)
            assert part, output
            output += part
        return output.decode(errors="replace")

    def quit(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"quit\n")
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


Opened = tuple[Cluster, Callable[[], list[str | Path]]]


@pytest.fixture(params=["qemu-tcp", "qemu-unix", "tgt"])
def opened(request: pytest.FixtureRequest, directory: Path, teardown: ExitStack) -> Opened:
    """A cluster with the volume `disk`, and the command that opens it through node 1."""
    if request.param != "tgt":
        cluster = started(request.getfixturevalue("new_cluster")(3))
        uri = (
            f"sheepdog://127.0.0.1:{cluster.port(1)}/disk"
            if request.param == "qemu-tcp"
            else f"sheepdog+unix:///disk?socket={cluster.socket(1)}"
        )
        command: list[str | Path] = [needs.qemu52("qemu-io"), "-f", "raw", "-t", "writeback", uri]
    else:
        needs.network_namespaces()
        needs.program("tgtd", "tgtadm", "qemu-io")
        network: NetworkNamespace = request.getfixturevalue("private_network")
        cluster = started(request.getfixturevalue("new_cluster")(3, prefix=network.enter))
        command = [*network.enter, "qemu-io", "-f", "raw", Target.uri]
    cluster.format()
    cluster.dog("vdi", "create", "disk", str(SIZE))
    if request.param == "tgt":
        target = Target(network, cluster.port(0), directory / "tgtd.log")
        teardown.callback(target.close)
        target.offer(f"tcp:127.0.0.1:{cluster.port(1)}:disk")
    return cluster, lambda: command


class Writer:
    """Writes batch after batch and remembers the volume after each; a block's bytes tell the batch."""

    def __init__(self, image: RunningImage) -> None:
        self._image = image
        self._random = Random(26)
        self.states: list[dict[int, int]] = [dict.fromkeys(range(SPOTS), 0)]  # of every spot, after so many batches
        self.begun = 0
        self.acked = 0

    def batch(self) -> None:
        spots = self._random.sample(range(SPOTS), DEPTH)
        value = len(self.states) % 250 + 1
        self.states.append(self.states[-1] | dict.fromkeys(spots, value))
        self.begun += 1
        self._image.do(*(f"aio_write -P {value} {offset(spot)} {BLOCK}" for spot in spots), "aio_flush")
        self.acked += 1

    def fits(self, found: dict[int, int], first: int, last: int) -> bool:
        """Whether this is the volume at one instant between batch `first` and batch `last`."""
        for number in range(first, last + 1):
            before, after = self.states[number], self.states[min(number + 1, last)]
            if all(found[spot] in (before[spot], after[spot]) for spot in found):
                return True
        return False


def offset(spot: int) -> int:
    """Neighbours lie in different objects."""
    return spot % 8 * (SIZE // 8) + spot // 8 * 9 * BLOCK


def contents(data: bytes) -> dict[int, int]:
    found = {}
    for spot in range(SPOTS):
        block = data[offset(spot) : offset(spot) + BLOCK]
        assert block == block[:1] * BLOCK, f"the block at {offset(spot)} is torn"
        found[spot] = block[0]
    return found


@pytest.mark.timeout(300)
def test_snapshots_under_a_writing_client(opened: Opened, teardown: ExitStack) -> None:
    cluster, command = opened
    image = RunningImage(command())
    teardown.callback(image.close)
    writer = Writer(image)
    windows: list[tuple[int, int]] = []
    trouble: list[BaseException] = []
    over = threading.Event()

    def take_snapshots() -> None:
        try:
            for number in range(SNAPSHOTS):
                first = writer.acked
                cluster.dog("vdi", "snapshot", "-s", f"s{number}", "disk")
                windows.append((first, writer.begun))
                while writer.acked < windows[-1][1] + BATCHES_BETWEEN and not over.is_set():
                    over.wait(0.005)
        except BaseException as error:
            trouble.append(error)

    taker = threading.Thread(target=take_snapshots)
    taker.start()
    try:
        while taker.is_alive():
            writer.batch()
    finally:
        over.set()
        taker.join()
    assert not trouble
    image.do("flush")
    image.quit()

    for number, (first, last) in enumerate(windows):
        found = contents(cluster.try_dog("vdi", "read", "-s", f"s{number}", "disk", check=True).stdout)
        assert writer.fits(found, first, last), f"snapshot {number} is no instant of batches {first} to {last}"
    for node in range(3):
        now = contents(cluster.try_dog("vdi", "read", "disk", node=node, check=True).stdout)
        assert now == writer.states[-1]
    again = RunningImage(command())
    teardown.callback(again.close)
    again.do(*(f"read -P {value} {offset(spot)} {BLOCK}" for spot, value in writer.states[-1].items()))
    again.quit()
    kinds = [row[0] for row in cluster.dog("vdi", "list", "-r", "disk").splitlines()]
    assert kinds == ["s"] * SNAPSHOTS + ["="]
    assert "finish check&repair disk" in cluster.dog("vdi", "check", "disk")
