"""Errors of system calls, injected into a running process by strace."""

from __future__ import annotations

import errno
import struct
import subprocess
from pathlib import Path
from typing import Self

from tests.support.processes import end


class Injection:
    """System calls of a process that touch one file fail with an error."""

    def __init__(self, pid: int, path: Path, calls: str, error: str) -> None:
        self._begin(pid, path.parent.parent / "strace.txt", ["-P", str(path)], calls, f"error={error}")

    def _begin(self, pid: int, output: Path, only: list[str], calls: str, what: str) -> None:
        self._output = output
        self._process = subprocess.Popen(
            ["strace", "-f", "-p", str(pid), "-o", str(self._output), *only, "-e", f"trace={calls}",
             "-e", f"inject={calls}:{what}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert "attached" in said, said

    def injected(self) -> int:
        return self._output.read_text().count("(INJECTED)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end([self._process.pid])
        self._process.communicate()


class DeathInjection(Injection):
    """The process is killed when it is about to open a file."""

    def __init__(self, pid: int, path: Path, output: Path) -> None:
        self._begin(pid, output, ["-P", str(path)], "openat", "error=EIO:signal=SIGKILL")


class SyncInjection(Injection):
    """Syncs that the kernel does for the process (io_submit) end with EIO, as its io_getevents tells."""

    def __init__(self, pid: int, output: Path) -> None:
        event = struct.pack("<QQqq", 0, 0, -errno.EIO, 0).hex()
        self._begin(pid, output, [], "io_getevents", f"poke_exit=@arg4={event}")

    def ended(self) -> int:
        """Syncs that ended meanwhile."""
        return self._output.read_text().count("io_getevents(")
