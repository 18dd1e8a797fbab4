"""nbdkit's threads: what they leave behind in Python when their connection has ended, and where they run."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.nbd import NbdServer, nbdsh
from tests.support.processes import resident_bytes, wait_until

CONNECTIONS = 60
LEFT_BYTES = 256 << 10  # one thread for each connection that leaves its state of 8 KiB makes 480
CLOSE_SECONDS = 20.0
OWN_THREADS = 3  # accepting clients, waiting for the end, choosing a processor
CONNECT_AND_READ = [
    "for n in range(COUNT):",
    "    h = connect(uri)",
    "    buffers = [nbd.Buffer(4096) for _ in range(64)]",
    "    cookies = [h.aio_pread(buffer, 0) for buffer in buffers]",
    "    for cookie in cookies:",
    "        while not h.aio_command_completed(cookie):",
    "            h.poll(-1)",
    "    h.shutdown()",
]


@pytest.mark.parametrize("threads", [16, 1])
def test_connections_leave_no_memory_behind(
    cluster3: Cluster, teardown: ExitStack, directory: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    needs.program("nbdkit")
    needs.libnbd()
    # libc's arenas, one for each of some threads, keep and give back more from round to round than a leak would be
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    cluster3.dog("vdi", "create", "v", "4M")
    cluster3.dog("vdi", "write", "v", "0", "4096", stdin=b"1" * 4096)
    server = NbdServer(cluster3, directory, "--threads", str(threads))
    teardown.callback(server.close)
    pid = server.process.pid

    def connect(count: int) -> int:
        """So many times; what the server's process then has."""
        script = [line.replace("COUNT", str(count)) for line in CONNECT_AND_READ]
        nbdsh(None, f"uri = {server.uri('v')!r}", *script)
        wait_until(lambda: thread_count(pid) <= OWN_THREADS, CLOSE_SECONDS, "end of the connections' threads")
        return resident_bytes(pid)

    before = connect(CONNECTIONS)  # the allocator's own high water comes with the first ones
    assert connect(CONNECTIONS) - before < LEFT_BYTES
    assert server.process.poll() is None


@pytest.mark.parametrize("spread", [False, True])
def test_a_thread_looks_for_a_processor(cluster3: Cluster, teardown: ExitStack, directory: Path, spread: bool) -> None:
    """What it does is a matter of tests/unit/test_nbd_placement.py."""
    needs.program("nbdkit")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor only: there is nothing to choose")
    server = NbdServer(cluster3, directory, *(["--spread"] if spread else []))
    teardown.callback(server.close)
    expected = OWN_THREADS - spread
    wait_until(lambda: thread_count(server.process.pid) == expected, CLOSE_SECONDS, f"{expected} threads")


def thread_count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
