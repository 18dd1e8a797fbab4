"""corosync daemons of a test's own: one on a private loopback, or several in namespaces that share a bridge.

Two daemons cannot share a network namespace (their sockets have abstract names) nor /run (the pid file), so each gets
its own of both. Stopped by process id, also when the start fails; shared memory that killed ones leave is removed.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.netns import LET_GO_OF_OTHERS, Network, NetworkNamespace
from tests.support.processes import environment, run, wait_until

from sheepdog.cluster.drivers import cpg

TOKEN_MS = 1000  # corosync's own default on Debian 12 is 3000; below 500 a busy machine breaks rings by itself
START_SECONDS = 60.0  # 1 s on a quiet machine
END_SECONDS = 10.0


def needed() -> None:
    """Ends the test with a reason where corosync cannot be started."""
    needs.network_namespaces()
    needs.program("corosync", "corosync-quorumtool")
    missing = cpg.missing()
    if missing is not None:
        pytest.skip(f"needs {missing}, which is not installed (packaging/install-packages test)")


def left_behind(pid: int) -> list[Path]:
    """What a daemon has outside its directory: its clients' buffers, and 8 MB of black box that stay after any end.

    The black box is in /tmp where a process of the same id has left one in /dev/shm.
    """
    places = {"/dev/shm": (f"qb-{pid}-*", f"qb-corosync-{pid}-*"), "/tmp": (f"corosync-{pid}-blackbox-*",)}
    return [path for place, names in places.items() for name in names for path in Path(place).glob(name)]


class Daemon:
    """One corosync in a namespace; `enter` stands before each command that shall talk to it."""

    def __init__(self, directory: Path, number: int, namespace: NetworkNamespace) -> None:
        self.directory = directory / f"corosync{number}"
        self.number = number
        self.enter = namespace.enter
        self.process: subprocess.Popen[bytes] | None = None
        (self.directory / "state").mkdir(parents=True)

    def configure(self, addresses: Sequence[str], quorum: Sequence[str]) -> None:
        # knet as in packaging/: with udpu a machine that sends and hears nothing keeps the others from agreeing.
        lines = [
            "totem {", "version: 2", "cluster_name: sheepdog-test", "transport: knet", "crypto_cipher: none",
            "crypto_hash: none", f"token: {TOKEN_MS}", "token_coefficient: 0", "}", "nodelist {",
        ]  # fmt: skip
        for number, address in enumerate(addresses, 1):
            lines += ["node {", f"ring0_addr: {address}", f"nodeid: {number}", f"name: n{number}", "}"]
        lines += ["}", "quorum {", "provider: corosync_votequorum", *quorum, "}"]
        lines += ["system {", f"state_dir: {self.directory}/state", "sched_rr: no", "move_to_cgroup: no", "}"]
        lines += ["logging {", "to_syslog: no", "to_stderr: no", "to_logfile: yes", f"logfile: {self.directory}/log"]
        (self.directory / "corosync.conf").write_text("\n".join([*lines, "}", ""]))

    def start(self) -> None:
        assert self.process is None
        # In a chroot `/` is no mount point: there the mounts stay as they are, which are private unless systemd ran.
        script = (
            f"mount --make-rprivate / 2>/dev/null; {LET_GO_OF_OTHERS} mount -t tmpfs tmpfs /run"
            f" && exec corosync -f -c {self.directory}/corosync.conf"
        )
        with open(self.directory / "output", "ab") as output:
            self.process = subprocess.Popen(
                [*self.enter, "unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
            )

    def quorum(self) -> tuple[bool, int]:
        """(quorate, number of votes); (False, 0) while nobody answers."""
        text = run([*self.enter, "corosync-quorumtool", "-s"], check=False).stdout.decode()
        values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return values.get("Quorate", "").strip() == "Yes", int(values.get("Total votes", "0"))

    def wait_votes(self, votes: int) -> float:
        def there() -> bool:
            assert self.process is not None and self.process.poll() is None, self.output()
            return self.quorum() == (True, votes)

        try:
            return wait_until(there, START_SECONDS, f"corosync {self.number} has {votes} votes", 0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def output(self) -> str:
        texts = [path.read_text(errors="replace") for path in sorted(self.directory.glob("[lo]*")) if path.is_file()]
        return f"corosync {self.number}:\n" + "\n".join(texts)[-3000:]

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the daemon and waits for it; nothing happens to one that does not run."""
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
        for left in left_behind(process.pid):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


class Corosync:
    """As many daemons as nodes of a network of their own. Call `close` in every case."""

    def __init__(self, directory: Path, count: int = 1, quorum: Sequence[str] = ()) -> None:
        """`quorum`: lines for that section of corosync.conf."""
        needed()
        self.network = Network(count)
        self.daemons = [Daemon(directory, number, node) for number, node in enumerate(self.network.nodes, 1)]
        for daemon in self.daemons:
            daemon.configure(self.network.addresses, quorum)

    def start(self) -> float:
        began = time.monotonic()
        for daemon in self.daemons:
            daemon.start()
        for daemon in self.daemons:
            daemon.wait_votes(len(self.daemons))
        return time.monotonic() - began

    def close(self) -> None:
        try:
            for daemon in self.daemons:
                daemon.stop()
        finally:
            self.network.close()
