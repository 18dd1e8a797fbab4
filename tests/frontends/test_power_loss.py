"""What a door has called durable survives a kill of everybody and the loss of power on every node."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support import needs
from tests.support.cluster import Cluster, started
from tests.support.mounts import SheepFs
from tests.support.nbd import NbdServer, holding, release
from tests.support.power import FragileDisk
from tests.support.processes import having_argument, send_signal, wait_ended

BLOCK = 4096
BLOCKS = (24 << 20) // BLOCK  # six objects, some of them not yet there when they are first written
STEPS = 400
UNFLUSHED = 40  # the last of them


class Step(NamedTuple):
    """`durable`: of this write alone; block -1: a flush of everything before."""

    block: int
    stamp: int
    durable: bool = False


FLUSH = Step(-1, 0)


def plan(seed: int, last: str) -> list[Step]:
    """Writes and flushes, then writes alone, then at once the one thing that shall count: a flush or a durable write.

    A node syncs its journal by itself when something in it is a second old, so what follows it must come at once.
    """
    chance = random.Random(seed)
    hot = [chance.randrange(BLOCKS) for _ in range(60)]
    steps = []
    for stamp in range(1, STEPS):
        quiet = stamp > STEPS - UNFLUSHED
        if not quiet and chance.random() < 0.05:
            steps.append(FLUSH)
        steps.append(Step(chance.choice(hot), stamp, not quiet and chance.random() < 0.1))
    return [*steps, FLUSH if last == "flush" else Step(hot[0], STEPS, True)]


def content_of(stamp: int) -> bytes:
    return stamp.to_bytes(8, "little") * (BLOCK // 8)


def check(steps: Sequence[Step], data: bytes, door: str) -> None:
    """Each block holds its last durable write, or a later one; nothing else is anywhere."""
    least = dict.fromkeys(range(BLOCKS), 0)  # the stamp that must be there at least
    last = dict(least)
    allowed: dict[int, list[int]] = {block: [0] for block in least}
    for step in steps:
        if step is FLUSH:
            least.update(last)
            continue
        last[step.block] = step.stamp
        allowed[step.block].append(step.stamp)
        if step.durable:
            least[step.block] = step.stamp
    for block in range(BLOCKS):
        found = data[block * BLOCK : (block + 1) * BLOCK]
        stamp = int.from_bytes(found[:8], "little")
        assert found == content_of(stamp), f"{door}: block {block} is torn"
        assert stamp in allowed[block], f"{door}: block {block} has {stamp}, which was never written there"
        assert stamp >= least[block], f"{door}: block {block} has {stamp}, and {least[block]} was durable"


class SheepFsDoor:
    """fsync, and O_DSYNC for a durable write."""

    def __init__(self, cluster: Cluster, directory: Path, teardown: ExitStack) -> None:
        needs.fuse()
        self._mount = SheepFs(cluster, directory / "dir", 1, "--transport=direct")
        teardown.callback(self._mount.close)
        self.pids = having_argument(str(self._mount.place))

    def carry_out(self, name: str, steps: Sequence[Step]) -> None:
        volume = self._mount.volume(name)
        plain, durable = os.open(volume, os.O_RDWR), os.open(volume, os.O_RDWR | os.O_DSYNC)
        for step in steps:
            if step is FLUSH:
                os.fsync(plain)
            else:
                os.pwrite(durable if step.durable else plain, content_of(step.stamp), step.block * BLOCK)
        self._open = (plain, durable)

    def close(self) -> None:
        for file in self._open:
            os.close(file)
        self._mount.close()


class NbdDoor:
    """Flush, and FUA for a durable write; by two connections in turn, each of which flushes for both."""

    def __init__(self, cluster: Cluster, directory: Path, teardown: ExitStack) -> None:
        needs.program("nbdkit")
        needs.libnbd()
        self._server = NbdServer(cluster, directory)
        teardown.callback(self._server.close)
        self.pids = [self._server.process.pid]

    def carry_out(self, name: str, steps: Sequence[Step]) -> None:
        uri = self._server.uri(name)
        self._client = holding(  # an orderly end would flush
            uri,
            f"others = [h, connect({uri!r})]",
            f"for turn, (block, stamp, durable) in enumerate({[tuple(step) for step in steps]!r}):",
            "    n = others[turn % 2]",
            "    if block < 0: n.flush()",
            f"    else: n.pwrite(stamp.to_bytes(8, 'little') * {BLOCK // 8}, block * {BLOCK}, int(durable))",
        )

    def close(self) -> None:
        release(self._client)
        self._server.close()


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        send_signal(pid, signal.SIGKILL)
    wait_ended(pids, 20, "everybody")


@pytest.mark.parametrize("door", (SheepFsDoor, NbdDoor))
def test_what_was_durable_survives(
    directory: Path, teardown: ExitStack, door: type[SheepFsDoor] | type[NbdDoor]
) -> None:
    needs.loop_devices()
    disk = FragileDisk(directory)
    teardown.callback(disk.close)
    cluster = Cluster(3, disk.place, options=(), driver=f"local:{directory}/membership")
    teardown.callback(cluster.close)
    started(cluster).format("-c", "3")
    for seed, last in enumerate(("flush", "durable")):
        client = door(cluster, directory, teardown)
        cluster.dog("vdi", "create", last, str(BLOCKS * BLOCK))
        everybody = [*client.pids, *(pid for node in range(3) for pid in cluster.pids(node))]
        canary = disk.place / f"canary-{last}"
        canary.write_bytes(b"nobody asked for this to be kept")
        steps = plan(seed, last)
        client.carry_out(last, steps)
        kill(everybody)
        client.close()
        disk.lose_power()
        assert not canary.exists() or not canary.read_bytes(), "the power never went away"
        started(cluster)
        for node in range(3):
            data = cluster.try_dog("vdi", "read", last, node=node, check=True).stdout
            check(steps, data, f"{door.__name__}, {last}")
