"""Errors of system calls, injected into a running process by strace."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.processes import end


class Injection:
    """System calls of a process that touch one file fail with an error."""

    def __init__(self, pid: int, path: Path, calls: str, error: str) -> None:
        self._output = path.parent.parent / "strace.txt"
        self._process = subprocess.Popen(
            ["strace", "-f", "-p", str(pid), "-o", str(self._output), "-P", str(path), "-e", f"trace={calls}",
             "-e", f"inject={calls}:error={error}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert "attached" in said, said

    def injected(self) -> int:
        return self._output.read_text().count("(INJECTED)")

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *_: object) -> None:
        end([self._process.pid])
        self._process.communicate()
