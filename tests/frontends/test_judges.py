"""Strangers judge while disks fail one after another: fio (--verify=crc32c) what it reads through NBD, QEMU's blkverify
what its own driver reads, against a plain file that gets the same writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.support import needs
from tests.support.cluster import Cluster, formatted
from tests.support.errors import Injection
from tests.support.nbd import NbdServer
from tests.support.processes import run, wait_until

SIZE_MIB = 16
HEAL_SECONDS = 120.0
PASS_SECONDS = 240.0
BATCHES = 30  # of a pass of blkverify


class Judge:
    """Writes and reads, again and again, from the start of `with` to its end; nothing may be wrong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.passes = 0
        self.failure = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Judge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.failure, self.failure

    def command(self) -> list[str]:
        """Of one pass."""
        raise NotImplementedError

    def is_wrong(self, done: subprocess.CompletedProcess[bytes]) -> bool:
        raise NotImplementedError

    def _run(self) -> None:
        while not self._stop.is_set() and not self.failure:
            done = run(self.command(), check=False, seconds=PASS_SECONDS, cwd=self._directory)
            if done.returncode or self.is_wrong(done):
                self.failure = (
                    f"pass {self.passes}: status {done.returncode}\n{(done.stdout + done.stderr).decode()[-3000:]}"
                )
            self.passes += 1

    def wait_pass(self) -> None:
        """One that began after this."""
        until = self.passes + 2
        wait_until(lambda: self.passes >= until or bool(self.failure), 2 * PASS_SECONDS, "a pass of fio")


class Fio(Judge):
    """Writes everything at random and verifies it, through NBD."""

    def __init__(self, uri: str, directory: Path) -> None:
        super().__init__(directory)
        self._command = [
            "fio", "--name=judge", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=4k-256k",
            f"--size={SIZE_MIB}M", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64",
            "--do_verify=1", "--thread", "--minimal", "--eta=never", "--fsync=16",
        ]  # fmt: skip

    def command(self) -> list[str]:
        return [*self._command, f"--randseed={self.passes + 1}"]

    def is_wrong(self, done: subprocess.CompletedProcess[bytes]) -> bool:
        return b"verify:" in done.stderr


class BlkVerify(Judge):
    """QEMU 5.2's own driver: whatever it reads is compared with a file, and so is each result."""

    def __init__(self, port: int, name: str, directory: Path) -> None:
        super().__init__(directory)
        raw = directory / "blkverify.raw"
        raw.touch()
        os.truncate(raw, SIZE_MIB << 20)
        self._command = [
            str(needs.qemu52("qemu-io")), "-t", "none", "--image-opts",
            f"driver=blkverify,raw.driver=file,raw.filename={raw},test.driver=sheepdog,test.server.type=inet,"
            f"test.server.host=127.0.0.1,test.server.port={port},test.vdi={name}",
        ]  # fmt: skip

    def command(self) -> list[str]:
        """Eight requests at a time that do not meet, then as many more; at last everything."""
        rng = random.Random(self.passes)
        script = []
        for _ in range(BATCHES):
            for place in rng.sample(range(SIZE_MIB), 8):
                start = rng.randrange(0, (1 << 20) - 512, 512)
                length = min(rng.choice((512, 4096, 70 << 10, 1 << 20)), (1 << 20) - start)
                start += place << 20
                if rng.random() < 0.6:
                    script.append(f"aio_write -q -P {rng.randrange(256)} {start} {length}")
                else:
                    script.append(f"aio_read -q {start} {length}")
            script.append("aio_flush")
            if rng.random() < 0.2:
                script.append("flush")
        script += [f"read -q {place}M 1M" for place in range(SIZE_MIB)]
        return [*self._command, *(part for line in script for part in ("-c", line))]

    def is_wrong(self, done: subprocess.CompletedProcess[bytes]) -> bool:
        return any(word in (done.stdout + done.stderr).lower() for word in (b"blkverify", b"failed", b"error"))


def test_judges_find_nothing_wrong_while_disks_fail(
    new_cluster: Callable[..., Cluster], tmp_path: Path, directory: Path
) -> None:
    needs.root()
    needs.program("fio", "nbdkit", "strace")
    needs.qemu52("qemu-io")
    places = {node: [tmp_path / f"disk{node}a", tmp_path / f"disk{node}b"] for node in range(3)}
    cluster = formatted(new_cluster(3, options=(), disks=places))
    for name in ("v", "w"):
        cluster.dog("vdi", "create", name, f"{SIZE_MIB}M")
    server = NbdServer(cluster, directory)

    def busiest(node: int) -> Path:
        """The object file of a node with the most in it; its disk is the one to fail."""
        files = [path for place in places[node] for path in place.glob("00*")]
        return max(files, key=lambda path: path.stat().st_blocks)

    def is_out(node: int, disk: Path) -> bool:
        listed = json.loads(cluster.dog("node", "md", "info", "--json", node=node))
        return [entry["path"] for entry in listed] == [str(place) for place in places[node] if place != disk]

    def heal(node: int, disk: Path) -> None:
        wait_until(lambda: is_out(node, disk), HEAL_SECONDS, f"end of a disk of node {node}")
        cluster.wait_recovered(HEAL_SECONDS)

    try:
        with Fio(server.uri("v"), tmp_path) as judge, BlkVerify(cluster.port(0), "w", tmp_path) as other:
            judge.wait_pass()
            disks = [busiest(node).parent for node in range(2)]
            shutil.rmtree(disks[0])
            heal(0, disks[0])
            cluster.dog("node", "md", "unplug", "-f", str(disks[1]), node=1)
            heal(1, disks[1])
            victim = busiest(2)
            with Injection(cluster.pids(2)[-1], victim, "pwrite64,fdatasync,preadv2", "EIO") as injection:
                wait_until(
                    lambda: is_out(2, victim.parent) or bool(judge.failure), HEAL_SECONDS, "end of a disk of node 2"
                )
                assert injection.injected()
            heal(2, victim.parent)
            judge.wait_pass()
            other.wait_pass()
    finally:
        server.close()
    for name in ("v", "w"):
        assert cluster.dog("vdi", "check", name) == f"finish check&repair {name}\n"
