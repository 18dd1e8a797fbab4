"""A network of its own for servers that listen wider than a test should: a namespace with nothing but its loopback."""

from __future__ import annotations

import subprocess
import time

from tests.support.processes import environment, run

LIFE_SECONDS = 900  # the holder ends by itself, whatever becomes of the test


class NetworkNamespace:
    """Held open by one sleeping process; `enter` stands before each command that shall run inside."""

    def __init__(self) -> None:
        script = f"ip link set lo up && echo ready && exec sleep {LIFE_SECONDS}"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=environment(),
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise AssertionError("no private network namespace could be made")
        self.enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]

    def wait_listening(self, port: int, seconds: float = 10.0) -> None:
        """Until something in here listens on a TCP port."""
        deadline = time.monotonic() + seconds
        while f":{port:04X} 00000000:0000 0A" not in run([*self.enter, "cat", "/proc/net/tcp"]).stdout.decode():
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.05)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(10)
