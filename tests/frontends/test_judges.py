"""fio judges (--verify=crc32c): what it wrote through NBD is what it reads, while disks fail one after another."""

from __future__ import annotations

import json
import shutil
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


class Judge:
    """fio writes everything at random and verifies it, again and again, from the start of `with` to its end."""

    def __init__(self, uri: str, directory: Path) -> None:
        self._command = [
            "fio", "--name=judge", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=4k-256k",
            f"--size={SIZE_MIB}M", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64",
            "--do_verify=1", "--thread", "--minimal", "--eta=never", "--fsync=16",
        ]  # fmt: skip
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

    def _run(self) -> None:
        while not self._stop.is_set() and not self.failure:
            seed = f"--randseed={self.passes + 1}"
            done = run([*self._command, seed], check=False, seconds=PASS_SECONDS, cwd=self._directory)
            if done.returncode or b"verify:" in done.stderr:
                self.failure = (
                    f"pass {self.passes}: status {done.returncode}\n{(done.stdout + done.stderr).decode()[-3000:]}"
                )
            self.passes += 1

    def wait_pass(self) -> None:
        """One that began after this."""
        until = self.passes + 2
        wait_until(lambda: self.passes >= until or bool(self.failure), 2 * PASS_SECONDS, "a pass of fio")


def test_fio_finds_nothing_wrong_while_disks_fail(
    new_cluster: Callable[..., Cluster], tmp_path: Path, directory: Path
) -> None:
    needs.root()
    needs.program("fio", "nbdkit", "strace")
    places = {node: [tmp_path / f"disk{node}a", tmp_path / f"disk{node}b"] for node in range(3)}
    cluster = formatted(new_cluster(3, options=(), disks=places))
    cluster.dog("vdi", "create", "v", f"{SIZE_MIB}M")
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
        with Judge(server.uri("v"), tmp_path) as judge:
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
    finally:
        server.close()
    assert cluster.dog("vdi", "check", "v") == "finish check&repair v\n"
