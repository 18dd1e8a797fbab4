"""Machines of a cluster beyond one host: each is a network namespace with its member of the engine and one sheep.

All sheep listen on the same port, each on its machine's address. Tests reach a sheep by its UNIX socket, which does
not depend on the network, or run `dog` on its machine.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support import corosync, zookeeper
from tests.support.cluster import Cluster
from tests.support.netns import Network
from tests.support.processes import BIN, run, wait_until

PORT = 7000
ZOOKEEPER_PORTS = (2181, 2888, 3888)
SESSION_MS = 2000
LEASE_SECONDS = {
    "corosync": 1.0,
    "zookeeper": SESSION_MS / 3000,
}  # docs/operations.md; whatever the code does
ENGINE_SECONDS = 60.0


class Machines(Cluster):
    """Machines 0..count-1; `engine` is `corosync` or `zookeeper`. Call `close` in every case."""

    def __init__(self, engine: str, directory: Path, count: int = 3, options: Sequence[str] = ("-n",)) -> None:
        {"corosync": corosync.needed, "zookeeper": zookeeper.needed}[engine]()
        self.engine = engine
        self.network = Network(count)
        self.daemons: list[corosync.Daemon] = []
        self.servers: list[zookeeper.Server] = []
        addresses = self.network.addresses
        try:
            if engine == "corosync":
                driver = "corosync"
                self.daemons = [
                    corosync.Daemon(directory, number, node) for number, node in enumerate(self.network.nodes, 1)
                ]
                for daemon in self.daemons:
                    daemon.configure(addresses, ())
            else:
                servers = ",".join(f"{address}:{ZOOKEEPER_PORTS[0]}" for address in addresses)
                driver = f"zookeeper:{servers}/test,timeout={SESSION_MS}"
                self.servers = [
                    zookeeper.Server(directory / f"zookeeper{number}", number, address, ZOOKEEPER_PORTS, node.enter)
                    for number, (address, node) in enumerate(zip(addresses, self.network.nodes, strict=True), 1)
                ]
                for server in self.servers:
                    server.configure(self.servers)
            super().__init__(count, directory, options=options, driver=driver)
        except BaseException:
            self.network.close()
            raise

    @property
    def lease_seconds(self) -> float:
        """What is advertised: a node answers for so long without the engine."""
        return LEASE_SECONDS[self.engine]

    # the engine's members, one on each machine

    @property
    def members(self) -> Sequence[corosync.Daemon | zookeeper.Server]:
        return self.daemons or self.servers

    def start_engine(self, *machines: int) -> None:
        """Starts members (all by default) that do not run, and waits until all those that run serve."""
        for machine in machines or range(self.count):
            if self.members[machine].process is None:
                self.members[machine].start()
        self.wait_engine()

    def wait_engine(self) -> None:
        for server in self.servers:
            if server.process is not None:
                server.wait_ready()
        running = [daemon for daemon in self.daemons if daemon.process is not None]
        for daemon in running:
            daemon.wait_votes(len(running))

    def leader(self) -> int:
        """The machine of the member that leads; with corosync all are alike."""
        if not self.servers:
            return 0
        found: list[int] = []

        def look() -> bool:
            found.extend(
                machine
                for machine, server in enumerate(self.servers)
                if server.process is not None and server.is_leader()
            )
            return bool(found)

        wait_until(look, ENGINE_SECONDS, "the ensemble has a leader", 0.1)
        return found[0]

    # what differs from a cluster on one host

    def port(self, node: int) -> int:
        return PORT

    def command(self, node: int, extra: Sequence[str] = ()) -> list[str]:
        return [
            *self.network.nodes[node].enter, str(BIN / "sheep"), str(self.store(node)), *self.options, *extra,
            "-c", self.driver, "-z", str(self.zones[node]), "-p", str(PORT),
        ]  # fmt: skip

    def try_dog(
        self, *words: str, node: int = 0, stdin: bytes = b"", check: bool = False, seconds: float = 120.0
    ) -> subprocess.CompletedProcess[bytes]:
        noun, verb, *rest = words
        command = [*self.network.nodes[node].enter, str(BIN / "dog"), noun, verb, "-p", str(PORT), *rest]
        return run(command, stdin=stdin, check=check, seconds=seconds)

    def healthy(self, nodes: Iterable[int] | None = None, seconds: float = ENGINE_SECONDS) -> None:
        """Until all machines are members, the cluster runs, and nothing is left to recover."""
        watched = list(nodes) if nodes is not None else list(range(self.count))
        self.wait_members(len(watched), watched, seconds)
        self.wait_status(0, watched, seconds)
        self.wait_recovered()

    def logs(self) -> str:
        return "\n".join([super().logs(), *(member.output()[-1500:] for member in self.members)])

    def close(self) -> None:
        closers: list[Callable[[], None]] = [super().close, *(member.stop for member in self.members)]
        try:
            for close in closers:
                close()
        finally:
            for member in self.members:
                member.stop()
            self.network.close()


class Site:
    """Machines for all tests of one engine; other ones after a test that failed. Call `close` in every case."""

    def __init__(self, engine: str, count: int) -> None:
        self.engine = engine
        self.count = count
        self.machines: Machines | None = None
        self._closing = ExitStack()

    def begin(self, copies: int) -> Machines:
        """A cluster that was just formatted."""
        if self.machines is None:
            directory = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="sheepdog-")))
            self.machines = made = Machines(self.engine, directory, self.count)
            self._closing.callback(made.close)
            made.start_engine()
            made.start()
            made.wait_members(self.count, range(self.count))
        self.machines.wait_engine()  # a member that was cut off comes back long after the cluster is healthy without it
        self.machines.format("-f", "-c", str(copies))
        return self.machines

    @contextmanager
    def used(self, request: pytest.FixtureRequest, copies: int) -> Iterator[Machines]:
        """For one test: the next one gets others if it fails."""
        failed = request.session.testsfailed
        try:
            made = self.begin(copies)
        except BaseException:
            self.close()
            raise
        yield made
        if request.session.testsfailed > failed:
            print(made.logs())
            self.close()

    def close(self) -> None:
        self.machines = None
        self._closing.close()


def engine_fixtures(count: int) -> tuple[Any, Any]:
    """What a test file calls `site` and `machines`: of each engine in turn, with a copy on each of them."""

    @pytest.fixture(scope="module", params=["zookeeper", "corosync"])
    def site(request: pytest.FixtureRequest) -> Iterator[Site]:
        with closing(Site(request.param, count)) as made:
            yield made

    @pytest.fixture
    def machines(request: pytest.FixtureRequest, site: Site) -> Iterator[Machines]:
        with site.used(request, copies=count) as made:
            yield made

    return site, machines
