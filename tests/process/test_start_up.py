"""How long a join and a death take, against what starting an interpreter takes in the same minute.

Clocks of shared machines say nothing by themselves, so the best of several tries is compared with the best start of
`sheep --version`, about 0.05 s on a quiet machine: a join within half a second is ten of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.cluster import Cluster, started
from tests.support.processes import BIN, run

TRIES = 6
JOIN_STARTS = 12  # from the command to membership as the others see it
NOTICE_STARTS = 12  # until the others know that a process was killed


def test_a_node_joins_and_its_death_is_noticed(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(4))
    cluster.format()
    starts, joins, deaths = [], [], []
    for _ in range(TRIES):
        begun = time.perf_counter()
        run([BIN / "sheep", "--version"])
        starts.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        cluster.kill(3)
        cluster.wait_members(3, [0, 1, 2])
        deaths.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        cluster.start(3)
        cluster.wait_members(4, [0, 1, 2])
        joins.append(time.perf_counter() - begun)
    assert min(joins) < JOIN_STARTS * min(starts), (joins, starts)
    assert min(deaths) < NOTICE_STARTS * min(starts), (deaths, starts)
