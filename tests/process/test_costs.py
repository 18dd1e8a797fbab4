"""What an operation costs, counted and not timed: system calls of all daemons for fixed loads.

The bounds leave room for small batches on a busy machine and under strace; the original needs about 130 calls for a
replicated write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from shutil import which

import pytest
from tests.bench.counting import calls_by_name
from tests.support.cluster import Cluster, started

from sheepdog.cluster.client.workload import Workload, parse_cell

RUN_S = 1.5
LIMITS = {"write:4k:16:volatile": 10.0, "write:4k:16:durable": 18.0, "read:4k:16": 2.5}
"""System calls per operation, three copies on three nodes.

Four runs on a busy machine: a volatile write took 5 to 8, a durable one 9 to 14, a read 1.2 (4 where each is a turn of
its own). A durable write that took 11 to 13: 3 for the object files; shared with the others of a turn 0.8 to 1.0
appends to the journals, 0.6 syncs and as many wake-ups, 2.7 to 3.1 receives, 1.8 to 2.1 sends, 1.7 to 2.2 looks at
sockets.
"""


@pytest.mark.skipif(which("strace") is None, reason="strace is not installed")
def test_system_calls_per_operation(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3, options=()))
    cluster.format("-c", "3")
    load = Workload(("127.0.0.1", cluster.port(0)), 4)
    pids = [pid for node in range(3) for pid in cluster.pids(node)]
    for word, limit in LIMITS.items():
        calls = calls_by_name(pids, partial(load.run, parse_cell(word), RUN_S))
        assert 1 <= sum(calls.values()) <= limit, (word, calls)
    load.close()
