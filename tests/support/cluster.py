"""A cluster of real `sheep` processes on this machine, with the embedded driver and directories of its own.

Started as a user would start it (each node daemonises); stopped by process id whatever happened before.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.support import native
from tests.support.ports import PortBlock
from tests.support.processes import BIN, end, having_argument, run, send_signal, wait_ended, wait_until

JOIN_SECONDS = 30.0  # a start takes below 0.5 s on a quiet machine
RECOVER_SECONDS = 120.0
RUNNING, WAIT_FOR_FORMAT, WAIT_FOR_JOIN = 0x00, 0x16, 0x17
LOG_TAIL_LINES = 40
OBJECT_NAME = re.compile(r"[0-9a-f]{16}(_\d+)?")


class Cluster:
    """Nodes 0..count-1, one zone each unless `zones` says otherwise. Call `close` in every case."""

    def __init__(
        self,
        count: int,
        directory: Path,
        *,
        zones: Sequence[int] | None = None,
        options: Sequence[str] = ("-n",),
        prefix: Sequence[str] = (),
        ports: PortBlock | None = None,
        disks: Mapping[int, Sequence[Path]] | None = None,
        driver: str | None = None,
        binaries: Path = BIN,
    ) -> None:
        """`options` go to every sheep; `prefix` stands before every command (nsenter ...).

        `binaries`: where `sheep` and `dog` are, of this or of another implementation.

        `driver` is the membership engine as -c wants it; by default one of this cluster's own.

        `disks`: the object directories of nodes that shall have others than the one in their store.

        `ports` become the cluster's: it closes them.
        """
        self.count = count
        self.directory = directory
        self.zones = list(zones) if zones is not None else list(range(count))
        self.options = list(options)
        self.prefix = list(prefix)
        self.ports = ports or PortBlock()
        self.binaries = binaries
        self.disks = {node: list(paths) for node, paths in (disks or {}).items()}
        self.driver = driver or f"local:{directory}/membership"

    # places

    def store(self, node: int) -> Path:
        return self.directory / f"store{node}"

    def socket(self, node: int) -> Path:
        return self.store(node) / "sock"

    def port(self, node: int) -> int:
        return self.ports[node]

    def log(self, node: int) -> Path:
        return self.store(node) / "sheep.log"

    def objects(self, node: int) -> dict[str, Path]:
        """Name and file of every object that this node holds now (superseded ones not counted)."""
        return {
            entry.name: Path(entry.path)
            for directory in self.disks.get(node, [self.store(node) / "obj"])
            if directory.is_dir()
            for entry in os.scandir(directory)
            if OBJECT_NAME.fullmatch(entry.name)
        }

    def place(self, node: int) -> str:
        """META[,DISK...] of a node, as on its command line."""
        return ",".join(map(str, [self.store(node), *self.disks.get(node, ())]))

    # life

    def start(self, *nodes: int, extra: Mapping[int, Sequence[str]] | None = None) -> None:
        """Starts nodes (all by default) in this order and does not wait for them to join."""
        for node in nodes or range(self.count):
            run(self.command(node, (extra or {}).get(node, ())))

    def start_fails(self, node: int, extra: Sequence[str] = ()) -> str:
        """Starts a node that cannot run: the one line that it says, to whoever starts it and in its log."""
        told = run(self.command(node, extra), check=False)
        text = told.stderr.decode()
        assert (told.returncode, told.stdout, text.count("\n")) == (1, b"", 1), text
        assert text in self.log(node).read_text()
        wait_ended(self.pids(node), JOIN_SECONDS, f"node {node}")
        return text.rstrip("\n")

    def command(self, node: int, extra: Sequence[str] = ()) -> list[str]:
        return [
            *self.prefix, str(self.binaries / "sheep"), self.place(node), *self.options, *extra,
            "-c", self.driver, "-z", str(self.zones[node]), "-p", str(self.port(node)),
        ]  # fmt: skip

    def pids(self, node: int) -> list[int]:
        return having_argument(self.place(node))

    def kill(self, node: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a node's processes; with SIGKILL or SIGTERM returns when they are gone."""
        pids = self.pids(node)
        assert pids, f"node {node} does not run"
        for pid in pids:
            send_signal(pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            wait_ended(pids, JOIN_SECONDS, f"node {node}")

    def running_nodes(self) -> list[int]:
        return [node for node in range(self.count) if self.pids(node)]

    def wait_members(self, members: int, nodes: Iterable[int] | None = None, seconds: float = JOIN_SECONDS) -> float:
        """Until each of `nodes` (those that run) sees `members` nodes; how long that took, in seconds."""
        watched = list(nodes) if nodes is not None else self.running_nodes()
        assert watched, "no node runs\n" + self.logs()

        def joined() -> bool:
            behind = [node for node in watched if native.member_count(self.socket(node)) != members]
            ended = [node for node in behind if not self.pids(node)]
            assert not ended, f"nodes {ended} have ended"
            return not behind

        return wait_until(joined, seconds, f"nodes {watched} see {members} members")

    def wait_status(self, result: int, nodes: Iterable[int] | None = None, seconds: float = JOIN_SECONDS) -> None:
        """Until each of `nodes` (those that run) answers STAT_CLUSTER with `result`."""
        watched = list(nodes) if nodes is not None else self.running_nodes()
        wait_until(
            lambda: all(native.status(self.socket(node)) == result for node in watched),
            seconds,
            f"nodes {watched} answer status {result:#x}",
        )

    def wait_recovered(self, seconds: float = RECOVER_SECONDS) -> float:
        """Until no node recovers, as `dog node recovery` sees it twice in a row."""
        start = wait_until(lambda: not self.recovering(), seconds, "end of recovery", step=0.1)
        return start + wait_until(lambda: not self.recovering(), seconds, "end of recovery", step=0.1)

    def recovering(self) -> list[list[str]]:
        """Rows of `dog node recovery -r`."""
        return [line.split() for line in self.dog("node", "recovery", "-r", node=self.any_node()).splitlines()]

    def any_node(self) -> int:
        return self.running_nodes()[0]

    def wait_stopped(self, seconds: float = JOIN_SECONDS) -> None:
        wait_ended([pid for node in range(self.count) for pid in self.pids(node)], seconds, "all nodes")

    def close(self) -> None:
        """Ends every process of this cluster and gives its ports back."""
        try:
            end([pid for node in range(self.count) for pid in self.pids(node)])
        finally:
            self.ports.close()

    # use

    def dog(self, *words: str, node: int = 0, stdin: bytes = b"", seconds: float = 120.0) -> str:
        """Output of a `dog` command that must succeed."""
        return self.try_dog(*words, node=node, stdin=stdin, check=True, seconds=seconds).stdout.decode()

    def try_dog(
        self, *words: str, node: int = 0, stdin: bytes = b"", check: bool = False, seconds: float = 120.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `dog NOUN VERB -p PORT ...` against a node."""
        noun, verb, *rest = words
        command = [*self.prefix, str(self.binaries / "dog"), noun, verb, "-p", str(self.port(node)), *rest]
        return run(command, stdin=stdin, check=check, seconds=seconds)

    def format(self, *options: str) -> None:
        self.dog("cluster", "format", *options, node=self.any_node())
        self.wait_status(RUNNING)

    def logs(self) -> str:
        """The end of every node's log, for the report of a failed test."""
        parts = []
        for node in range(self.count):
            try:
                lines = self.log(node).read_text(errors="replace").splitlines()
            except OSError as error:
                lines = [str(error)]
            parts.append(f"--- node {node} (port {self.port(node)})\n" + "\n".join(lines[-LOG_TAIL_LINES:]))
        return "\n".join(parts)


def started(cluster: Cluster) -> Cluster:
    """Starts all nodes and waits until each sees all."""
    cluster.start()
    cluster.wait_members(cluster.count, range(cluster.count))
    return cluster


def formatted(cluster: Cluster) -> Cluster:
    """Started, with three copies of everything."""
    started(cluster).format("-c", "3")
    return cluster


def with_locks(cluster: Cluster) -> Cluster:
    """Runs, enforces locks, keeps two copies, and has the volume "v" of 16 MiB."""
    started(cluster).format("-l", "-c", "2")
    cluster.dog("vdi", "create", "v", "16M")
    return cluster
