"""ZooKeeper servers of a test's own, on loopback addresses and in directories of its own.

A server counts as started only when the one that answers says that it uses our data directory: one that an earlier
run left behind would answer as well. Stopped by process id, also when the start fails.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import pytest
from tests.support.ports import PortBlock
from tests.support.processes import environment, wait_until, which

JAR = Path("/usr/share/java/zookeeper.jar")
TICK_MS = 200  # sessions may be as short as two ticks
SYNC_LIMIT_TICKS = 10  # how long a leader may be silent before the others elect another one
START_SECONDS = 60.0  # 0.5 s for one server, 1.4 s for three on a quiet machine
END_SECONDS = 10.0
_LOG4J = """log4j.rootLogger=INFO, F
log4j.appender.F=org.apache.log4j.FileAppender
log4j.appender.F.File={directory}/server.log
log4j.appender.F.layout=org.apache.log4j.PatternLayout
log4j.appender.F.layout.ConversionPattern=%d{{ISO8601}} %p %m%n
"""


def needed() -> None:
    """Ends the test with a reason where ZooKeeper cannot be started."""
    if not JAR.exists() or which("java") is None:
        pytest.skip("needs zookeeper, which is not installed (packaging/install-packages test)")
    pytest.importorskip("kazoo", reason="needs kazoo, which is not installed (pip install '.[zookeeper]')")


class Server:
    """One server; `address` is HOST:PORT for clients."""

    def __init__(self, directory: Path, number: int, host: str, ports: Sequence[int], prefix: Sequence[str]) -> None:
        self.directory = directory
        self.number = number
        self.host = host
        self.port, self.quorum_port, self.election_port = ports
        self.prefix = list(prefix)
        self.address = f"{host}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir(parents=True)
        (directory / "log4j.properties").write_text(_LOG4J.format(directory=directory))

    def configure(self, ensemble: Sequence[Server]) -> None:
        lines = [
            f"tickTime={TICK_MS}", f"dataDir={self.directory}/data", f"clientPort={self.port}",
            f"clientPortAddress={self.host}", "admin.enableServer=false", "4lw.commands.whitelist=*",
            "initLimit=50", f"syncLimit={SYNC_LIMIT_TICKS}", "minSessionTimeout=400", "maxSessionTimeout=60000",
        ]  # fmt: skip
        if len(ensemble) > 1:
            (self.directory / "data" / "myid").write_text(f"{self.number}\n")
            lines += [f"server.{one.number}={one.host}:{one.quorum_port}:{one.election_port}" for one in ensemble]
        (self.directory / "zoo.cfg").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        assert self.process is None
        command = [
            *self.prefix, "java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            f"-Dlog4j.configuration=file:{self.directory}/log4j.properties", "-cp", str(JAR),
            "org.apache.zookeeper.server.quorum.QuorumPeerMain", f"{self.directory}/zoo.cfg",
        ]  # fmt: skip
        with open(self.directory / "output", "ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment()
            )

    def wait_ready(self) -> float:
        """Until it serves; how long that took, in seconds."""
        took = wait_until(lambda: "Mode:" in self.ask("srvr"), START_SECONDS, f"ZooKeeper {self.number} serves", 0.05)
        found = re.search(r"^dataDir=(.*?)/version-2$", self.ask("conf"), re.MULTILINE)
        assert found is not None and found[1] == f"{self.directory}/data", "another server answers at our address"
        return took

    def ask(self, word: str) -> str:
        """The answer to a four-letter word; empty while nobody answers."""
        assert self.process is not None and self.process.poll() is None, self.output()
        return self._ask(word)

    def _ask(self, word: str) -> str:
        if self.prefix:  # in a namespace of its own
            done = subprocess.run(
                [*self.prefix, "bash", "-c", f"exec 3<>/dev/tcp/{self.host}/{self.port}; echo {word} >&3; cat <&3"],
                capture_output=True, env=environment(), timeout=5, check=False,
            )  # fmt: skip
            return done.stdout.decode(errors="replace")
        try:
            with socket.create_connection((self.host, self.port), 2.0) as connection:
                connection.sendall(word.encode())
                answer = b""
                while piece := connection.recv(65536):
                    answer += piece
        except OSError:
            return ""
        return answer.decode(errors="replace")

    def is_leader(self) -> bool:
        return "Mode: leader" in self.ask("srvr")

    def output(self) -> str:
        texts = [path.read_text(errors="replace") for path in self.directory.glob("*put")]
        texts += [path.read_text(errors="replace") for path in self.directory.glob("server.log")]
        return f"ZooKeeper {self.number}:\n" + "\n".join(texts)[-4000:]

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the server and waits for it; nothing happens to one that does not run."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_SECONDS)


class Ensemble:
    """One or more servers. Call `close` in every case."""

    def __init__(self, directory: Path, count: int = 1) -> None:
        needed()
        self._ports = PortBlock()
        ports = [self._ports[index] for index in range(3)]
        self.servers = [
            Server(directory / f"zookeeper{number}", number, f"127.0.0.{number}", ports, ())
            for number in range(1, count + 1)
        ]
        for server in self.servers:
            server.configure(self.servers)

    @property
    def address(self) -> str:
        """The servers as `-c zookeeper:` wants them."""
        return ",".join(server.address for server in self.servers)

    def start(self) -> float:
        """Starts those that do not run; how long it took until all serve, in seconds."""
        began = time.monotonic()
        for server in self.servers:
            if server.process is None:
                server.start()
        for server in self.servers:
            server.wait_ready()
        return time.monotonic() - began

    def leader(self) -> Server:
        """The server that leads (a single one leads itself)."""
        if len(self.servers) == 1:
            return self.servers[0]
        found: list[Server] = []

        def look() -> bool:
            found.extend(server for server in self.servers if server.process is not None and server.is_leader())
            return bool(found)

        wait_until(look, START_SECONDS, "the ensemble has a leader", 0.05)
        return found[0]

    def close(self) -> None:
        try:
            for server in self.servers:
                server.stop()
        finally:
            self._ports.close()


@contextmanager
def running_servers(count: int = 1) -> Iterator[Ensemble]:
    """In a directory of their own, gone afterwards with all that they kept."""
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-"))
    ensemble = Ensemble(directory, count)
    try:
        ensemble.start()
        yield ensemble
    finally:
        ensemble.close()
        rmtree(directory, ignore_errors=True)
