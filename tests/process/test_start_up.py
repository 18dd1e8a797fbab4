"""How long a join and a death take: the best of several tries, since a loaded machine makes any single one slow."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.cluster import Cluster, started

TRIES = 6
JOIN_SECONDS = 0.5  # from the command to membership as the others see it
NOTICE_SECONDS = 0.5  # until the others know that a process was killed


def test_a_node_joins_and_its_death_is_noticed(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(4))
    cluster.format()
    joins, deaths = [], []
    for _ in range(TRIES):
        start = time.perf_counter()
        cluster.kill(3)
        cluster.wait_members(3, [0, 1, 2])
        deaths.append(time.perf_counter() - start)
        start = time.perf_counter()
        cluster.start(3)
        cluster.wait_members(4, [0, 1, 2])
        joins.append(time.perf_counter() - start)
    assert min(joins) < JOIN_SECONDS, joins
    assert min(deaths) < NOTICE_SECONDS, deaths
