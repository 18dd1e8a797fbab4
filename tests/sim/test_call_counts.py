"""What a request costs in Python function calls, counted over all nodes: the same on every machine.

The simulator runs the shipped core; store and network are its own and not counted. A change that makes a write dearer
shows here and has to say why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from tests.sim.test_directed import fresh

from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.world import SECOND

REQUESTS = 64  # many enough that timers do not count
WRITE_LIMIT = 112.0  # through the object's home 91, through another node 107
READ_LIMIT = 24.0  # at the object's home 24, at another replica 17


def calls_per_request(
    start: Callable[[int, Callable[[], None]], None], run: Callable[[Callable[[], bool]], None]
) -> float:
    """Calls of functions of cluster/core per request; all REQUESTS are under way together."""
    done = 0

    def answered() -> None:
        nonlocal done
        done += 1

    counted = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal counted
        if event == "call" and "/cluster/core/" in frame.f_code.co_filename:
            counted += 1

    sys.setprofile(count)
    try:
        for number in range(REQUESTS):
            start(number, answered)
        run(lambda: done == REQUESTS)
    finally:
        sys.setprofile(None)
    return counted / REQUESTS


def test_calls_per_request() -> None:
    cluster, volume = fresh(3, 3)
    oid = data_oid(volume.vid, 0)
    data = bytes(BLOCK_SIZE)

    def run(ended: Callable[[], bool]) -> None:
        cluster.world.run_until(ended, 5 * SECOND, "answers")

    for machine in cluster.machines:
        gateway = machine.node.gateway

        def write(number: int, answered: Callable[[], None]) -> None:
            gateway.write(oid, BLOCK_SIZE * number, data, False, lambda result, _: answered())  # noqa: B023

        def read(number: int, answered: Callable[[], None]) -> None:
            gateway.read(oid, BLOCK_SIZE * number, BLOCK_SIZE, lambda result, _: answered())  # noqa: B023

        calls_per_request(write, run)  # placement and connections are remembered from here on
        assert 20 < calls_per_request(write, run) <= WRITE_LIMIT
        cluster.world.run_for(SECOND)
        calls_per_request(read, run)
        assert 2 < calls_per_request(read, run) <= READ_LIMIT
