"""nbdkit's fault filters behind the NBD door: a disk that its volume is stored on is slow, then fails.

(In front of it: tests/frontends/test_nbd.py.)
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support import needs
from tests.support.cluster import Cluster, formatted
from tests.support.mounts import LoopMount, mounted
from tests.support.nbd import NbdServer, nbdsh
from tests.support.processes import end, environment, run, wait_until

MIB = 1 << 20
DISK_BYTES = 256 << 30  # most of the node's objects; only what is written takes memory
SECONDS = 60.0


class FaultyDisk:
    """A file of nbdkit's memory whose writes take their time, and fail while `failing` exists."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.failing = directory / "failing"
        self.file = directory / "disk"
        self.file.touch()
        socket = directory / "disk.sock"
        self._start(
            stack,
            "nbdkit", "-f", "-U", str(socket), "--filter=error", "--filter=delay", "memory", str(DISK_BYTES),
            "error-pwrite=EIO", "error-pwrite-rate=1", f"error-file={self.failing}", "wdelay=1ms",
        )  # fmt: skip
        wait_until(socket.exists, SECONDS, "nbdkit")
        self._start(stack, "nbdfuse", str(self.file), f"nbd+unix:///?socket={socket}")
        stack.callback(run, ["umount", "-l", self.file], check=False)
        wait_until(lambda: mounted(self.file) and self.file.stat().st_size == DISK_BYTES, SECONDS, "nbdfuse")
        run(["mkfs.ext4", "-q", "-F", "-N", "1024", "-J", "size=8", "-E", "lazy_journal_init=1", self.file])

    @staticmethod
    def _start(stack: ExitStack, *command: str) -> None:
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        stack.callback(process.wait, SECONDS)
        stack.callback(end, [process.pid])


def test_a_disk_behind_the_door_is_slow_and_then_fails(
    new_cluster: Callable[..., Cluster], mount_loop: Callable[..., LoopMount], directory: Path, teardown: ExitStack
) -> None:
    """The client sees neither: what it wrote, durably and not, it reads again, and so does everybody else."""
    needs.fuse()
    needs.loop_devices()
    needs.program("nbdkit", "nbdfuse")
    needs.libnbd()
    disk = FaultyDisk(directory, teardown)
    faulty = mount_loop(disk.file).place / "store"
    cluster = formatted(new_cluster(3, options=(), disks={0: [directory / "sound", faulty]}))
    cluster.dog("vdi", "create", "v", "64M")
    assert disks(cluster) == {str(directory / "sound"), str(faulty)}
    server = NbdServer(cluster, directory, "v")
    teardown.callback(server.close)
    model = directory / "model"
    nbdsh(
        server.uri("v"),
        "import random, time",
        "chance, model = random.Random(1), bytearray(64 << 20)",
        "def write(count):",
        "    for turn in range(count):",
        "        data = chance.randbytes(chance.choice((512, 5000, 300_000)))",
        "        place = chance.randrange((64 << 20) - len(data))",
        "        h.pwrite(data, place, turn % 2 * nbd.CMD_FLAG_FUA)",
        "        model[place : place + len(data)] = data",
        "write(80); h.flush()",
        f"open({str(disk.failing)!r}, 'w').close()",
        "write(80); h.flush()",
        "assert b''.join(h.pread(4 << 20, place << 20) for place in range(0, 64, 4)) == bytes(model)",
        f"open({str(model)!r}, 'wb').write(model)",
    )
    wait_until(lambda: disks(cluster) == {str(directory / "sound")}, SECONDS, "end of the disk")
    for node in cluster.running_nodes():
        assert cluster.try_dog("vdi", "read", "v", node=node, check=True).stdout == model.read_bytes()
    assert cluster.running_nodes() == [0, 1, 2]
    assert server.text() == ""


def disks(cluster: Cluster) -> set[str]:
    return {entry["path"] for entry in json.loads(cluster.dog("node", "md", "info", "--json"))}
