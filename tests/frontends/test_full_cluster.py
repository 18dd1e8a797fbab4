"""Disks without room under the doors: clients are told ENOSPC, what is there stays usable, discarding ends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support import needs
from tests.support.cluster import Cluster, started
from tests.support.mounts import SheepFs
from tests.support.nbd import NbdServer, nbdsh
from tests.support.power import FragileDisk
from tests.support.processes import run

MIB = 1 << 20
TRIES = 400  # MiB: more than fits on the disk three times


def until_full(write: Callable[[int], object]) -> int:
    """Writes MiB after MiB; how many there was room for."""
    for number in range(TRIES):
        try:
            write(number * MIB)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return number
    raise AssertionError("the disk never became full")


def test_no_space_is_told_as_such(directory: Path, teardown: ExitStack) -> None:
    needs.loop_devices()
    needs.fuse()
    needs.program("nbdkit", "fallocate")
    needs.libnbd()
    disk = FragileDisk(directory, "700M")
    teardown.callback(disk.close)
    cluster = Cluster(3, disk.place, options=("-n", "-j", "size=72M"), driver=f"local:{directory}/membership")
    teardown.callback(cluster.close)
    started(cluster).format("-c", "3")
    for name in ("file", "nbd"):
        cluster.dog("vdi", "create", name, "1G")
    mount = SheepFs(cluster, directory / "dir", 0, "--transport=direct")
    teardown.callback(mount.close)
    volume = mount.volume("file")
    data = os.urandom(MIB)
    file = os.open(volume, os.O_RDWR)
    teardown.callback(os.close, file)
    written = until_full(lambda offset: os.pwrite(file, data, offset))
    assert written > 8
    os.pwrite(file, b"what is there can be changed", 4096)
    os.fsync(file)
    assert os.pread(file, 28, 4096) == b"what is there can be changed"
    assert os.pread(file, MIB, (written - 1) * MIB) == data
    server = NbdServer(cluster, directory)
    teardown.callback(server.close)
    nbdsh(
        server.uri("nbd"),
        "try:",
        f"    for n in range({TRIES}): h.pwrite(bytes([n % 255 + 1]) * {MIB}, n * {MIB})",
        "except nbd.Error as e: assert e.errnum == errno.ENOSPC, e",
        "else: assert False, 'the disk never became full'",
        "h.trim(1 << 30, 0); assert h.pread(4096, 0) == bytes(4096)",
    )
    assert "No space left on device" in server.text()
    run(["fallocate", "-p", "-o", "0", "-l", "1G", volume])
    nbdsh(server.uri("nbd"), "h.pwrite(b'room again' * 100000, 0, nbd.CMD_FLAG_FUA)")
    assert until_full(lambda offset: os.pwrite(file, data, offset)) > written // 2
    assert cluster.dog("vdi", "check", "nbd") == "finish check&repair nbd\n"
